// The arguments of attention, its division into tasks, and the addresses of a task's rows.

#pragma once

#include <algorithm>

#include "attention_products.h"

namespace afnext {

constexpr float kLowest = -3.4028234663852886e38f;  // instead of -inf: a row that has seen no key forms no inf - inf
constexpr int kInt8 = 3, kInt4 = 4, kFloat8 = 5;    // dtypes of a quantized cache, besides those of DType

// Keys or values. Token t of sequence b is in slot t % page_size of page table[b][t / page_size], or, dense, in page b.
struct Cache {
  const char* data;
  const float* scales;  // [pages, page_size, kv_heads] of a quantized cache, else null
  int64_t page, slot, head;
};

struct Problem {
  const char* q;
  char* out;
  Cache keys, values;
  const float *cos, *sin;  // [batch * queries, pairs], or null
  const int64_t* key_lengths;
  const int32_t* page_table;
  const void* k_bias;              // [kv_heads, head_dim] of `dtype`, not in the stored int4 keys, or null
  const float *key_cos, *key_sin;  // [tokens, head_dim / 2] in rows of turn_row: rotation of k_bias
  float *parts, *statistics;       // [batch, kv_heads, part, rows, head_dim], and [.., 2]: maximum and sum of each row
  int64_t batch, queries, heads, kv_heads, head_dim, max_keys, page_size, table_row, turn_row, pairs;
  bool half, causal;
  bool rounds;  // queries and weights may become bytes where that is faster, if the cache is int8
  int64_t q_batch, q_token, q_head;
  int64_t dtype, cache_dtype;
  int64_t row_block, part_keys;
  float sign, scale;  // queries are multiplied by sign (1, -1 or 0), scores by scale > 0, which includes log2(e)

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return queries * group(); }
  int64_t depth() const { return (head_dim + kChunk - 1) / kChunk * kChunk; }
  int64_t part_count() const { return part_keys ? (max_keys + part_keys - 1) / part_keys : 1; }
  int64_t cache_row() const { return cache_dtype == kInt4 ? head_dim / 2 : head_dim; }  // elements of a head
  int64_t length(int64_t b) const { return key_lengths ? key_lengths[b] : max_keys; }
};

// A thread's memory.
template <typename Element>
struct Workspace {
  Element *queries, *keys, *values, *weights, *staged;
  float *sums, *row_max, *row_sum, *scores;
  int32_t* last;

  Workspace(const Problem& p, float* memory) {
    const int64_t rows = (p.row_block + 95) / 96 * 96, depth = p.depth();
    const uintptr_t address = (uintptr_t)memory;
    memory += ((64 - address % 64) % 64) / sizeof(float);
    const auto take = [&](int64_t floats) {
      float* taken = memory;
      memory += floats;
      return taken;
    };
    queries = (Element*)take(rows * depth);
    sums = take(rows * depth);
    row_max = take(rows);
    row_sum = take(rows);
    last = (int32_t*)take(rows);
    keys = (Element*)take(kBlock * depth);
    values = (Element*)take(kBlock * depth);
    scores = take(kBlock * kWide * kLanes);
    weights = std::is_same_v<Element, float> ? (Element*)scores : (Element*)take(kBlock * kWide * kLanes);
    staged = (Element*)take((kChunk + 1) * depth);
  }
};

struct Task {
  int64_t b, kv_head, part, first_row, rows, first_key, end_key;
};

// The address of a token of a sequence, and of the next token.
class Place {
 public:
  Place(const Problem& p, int64_t b, int64_t token)
      : table_(p.page_table ? p.page_table + b * p.table_row : nullptr),
        page_size_(p.page_size),
        index_(table_ ? token / p.page_size : 0),
        slot_(table_ ? token % p.page_size : token),
        batch_(b) {}

  int64_t page() const { return table_ ? table_[index_] : batch_; }
  int64_t slot() const { return slot_; }
  int64_t element(const Cache& cache) const { return page() * cache.page + slot_ * cache.slot; }

  // Tokens from this one to the end of its page.
  int64_t left() const { return table_ ? page_size_ - slot_ : INT64_MAX / 2; }

  // Moves on by this many tokens, at most `left`.
  void skip(int64_t tokens) {
    slot_ += tokens;
    if (slot_ == page_size_ && table_) {
      slot_ = 0;
      ++index_;
    }
  }
  void next() { skip(1); }

 private:
  const int32_t* table_;
  int64_t page_size_, index_, slot_, batch_;
};

// Prefetch of a decoding thread: while it computes one head of a part of the keys, it prefetches its share of the next
// part, all heads of a token at once, because contiguous reads are faster.
inline Fetch fetch_ahead(const Problem& p, const Task& task) {
  const int64_t size = p.cache_dtype >= kInt8 ? 1 : p.cache_dtype == kFloat32 ? 4 : 2, row = p.cache_row();
  Fetch fetch(p.kv_heads * row * size);
  if (!p.parts || p.keys.head != row || p.values.head != row) return fetch;
  const int64_t share = (p.part_keys + p.kv_heads - 1) / p.kv_heads;
  const int64_t first = task.first_key + p.part_keys + task.kv_head * share;
  const int64_t end = std::min({first + share, task.first_key + 2 * p.part_keys, p.length(task.b)});
  if (first >= end) return fetch;
  Place place(p, task.b, first);
  for (int64_t token = first; token < end; ++token, place.next()) {
    fetch.add(p.keys.data + place.element(p.keys) * size);
    fetch.add(p.values.data + place.element(p.values) * size);
  }
  return fetch;
}

// The address of a row of the task's queries.
inline int64_t query_offset(const Problem& p, const Task& task, int64_t row) {
  const int64_t group = p.group();
  return task.b * p.q_batch + row / group * p.q_token + (task.kv_head * group + row % group) * p.q_head;
}

// The last key visible to a row of the task.
inline int64_t last_visible(const Problem& p, const Task& task, int64_t row) {
  const int64_t length = p.length(task.b);
  return p.causal ? length - p.queries + row / p.group() : length - 1;
}

}  // namespace afnext
