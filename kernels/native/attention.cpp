// Attention over many queries or few, dense or paged: see attention.py and decode_attention.py for what it computes.
//
// The query heads of a KV head are neighbouring rows: row r of a KV head is query r / group of its head r % group. A task
// is a block of rows, a KV head, a sequence and a part of its keys. It walks over its keys a block at a time, and for each
// block over its rows a tile at a time, with a running maximum and sum (online softmax) and exponentials of base 2.
// Keys and values of a block are converted and laid out once for all rows of the task. Where the keys are divided into
// parts, each task leaves its unnormalized sums, and a second pass weighs the parts.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "attention_products.h"
#include "rows.h"

namespace afnext {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;  // instead of -inf: a row that has seen no key forms no inf - inf
constexpr int kInt8 = 3;                            // dtype of a quantized cache, besides those of DType

// Keys or values. Token t of sequence b lies in slot t % page_size of page table[b][t / page_size], or dense in page b.
struct Cache {
  const char* data;
  const float* scales;  // [pages, page_size, kv_heads] with int8, else null
  int64_t page, slot, head;
};

struct Problem {
  const char* q;
  char* out;
  Cache keys, values;
  const float *cos, *sin;  // [batch * queries, pairs], or null
  const int64_t* key_lengths;
  const int32_t* page_table;
  float *parts, *statistics;  // [batch, kv_heads, part, rows, head_dim], and [.., 2]: maximum and sum of each row
  int64_t batch, queries, heads, kv_heads, head_dim, max_keys, page_size, table_row, pairs;
  bool half, causal;
  int64_t q_batch, q_token, q_head;
  int64_t dtype, cache_dtype;
  int64_t row_block, part_keys;
  float sign, scale;  // queries are multiplied by sign (1, -1 or 0), scores by scale > 0, which includes log2(e)

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return queries * group(); }
  int64_t depth() const { return (head_dim + kChunk - 1) / kChunk * kChunk; }
  int64_t part_count() const { return part_keys ? (max_keys + part_keys - 1) / part_keys : 1; }
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

// Where a token of a sequence lies, and the one after it.
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

  // To the token so many behind this one, at most `left`.
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

// What a decoding thread reads next: while it works on one head of a part of the keys, its share of the next part, all
// heads of a token at once, as memory gives more of what is contiguous.
Fetch fetch_ahead(const Problem& p, const Task& task) {
  const int64_t size = p.cache_dtype == kInt8 ? 1 : p.cache_dtype == kFloat32 ? 4 : 2;
  Fetch fetch(p.kv_heads * p.head_dim * size);
  if (!p.parts || p.keys.head != p.head_dim || p.values.head != p.head_dim) return fetch;
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

// A row that is wanted soon: rows lie too far apart for the CPU to notice that they are read one after the other.
template <typename From>
inline void prefetch(const From* row, int64_t count) {
  for (int64_t d = 0; d < count; d += 64 / (int64_t)sizeof(From)) __builtin_prefetch(row + d);
}

// One row as `Element`, zeros behind its head_dim: the row itself where it is so already.
template <typename Element, typename From>
const Element* row_as(const From* from, float scale, int64_t head_dim, int64_t depth, Element* staged) {
  if constexpr (std::is_same_v<Element, From>) {
    if (head_dim == depth) return from;
  }
  convert(from, head_dim, scale, staged);
  for (int64_t d = head_dim; d < depth; ++d) staged[d] = Element{};
  return staged;
}

// Calls put(rows, chunk) for each chunk of keys first .. first + count - 1, with zeros for what is past the last.
template <typename Element, typename From, typename Put>
void for_chunks(const Problem& p, const Cache& cache, const Task& task, int64_t first, int64_t count,
                Workspace<Element>& work, Put put) {
  const int64_t depth = p.depth();
  Element* zeros = work.staged + kChunk * depth;
  std::memset((void*)zeros, 0, depth * sizeof(Element));
  const auto at = [&](const Place& place) {
    return (const From*)cache.data + place.element(cache) + task.kv_head * cache.head;
  };
  Place place(p, task.b, first), later(p, task.b, first + kChunk);
  for (int64_t start = 0; start < count; start += kChunk) {
    const Element* rows[kChunk];
    for (int64_t i = 0; i < kChunk; ++i) {
      if (start + i >= count) {
        rows[i] = zeros;
        continue;
      }
      float scale = 1;
      if constexpr (std::is_same_v<From, int8_t>) {
        scale = cache.scales[(place.page() * p.page_size + place.slot()) * p.kv_heads + task.kv_head];
      }
      if (start + i + kChunk < count) {
        prefetch(at(later), p.head_dim);
        later.next();
      }
      rows[i] = row_as(at(place), scale, p.head_dim, depth, work.staged + i * depth);
      place.next();
    }
    put(rows, (int)(start / kChunk));
  }
}

template <typename Products, typename From>
void load_block(const Problem& p, const Task& task, int64_t first, int64_t count,
                Workspace<typename Products::Element>& work, Fetch& fetch) {
  const int depth = p.depth();
  using Rows = const typename Products::Element* const*;
  const auto put_keys = [&](Rows rows, int chunk) { Products::put_keys(rows, chunk, depth, work.keys, fetch); };
  const auto put_values = [&](Rows rows, int chunk) { Products::put_values(rows, chunk, depth, work.values, fetch); };
  for_chunks<typename Products::Element, From>(p, p.keys, task, first, count, work, put_keys);
  for_chunks<typename Products::Element, From>(p, p.values, task, first, count, work, put_values);
}

// Where a row of the task's queries begins.
int64_t query_offset(const Problem& p, const Task& task, int64_t row) {
  const int64_t group = p.group();
  return task.b * p.q_batch + row / group * p.q_token + (task.kv_head * group + row % group) * p.q_head;
}

// The last key that a row of the task sees.
int64_t last_visible(const Problem& p, const Task& task, int64_t row) {
  const int64_t length = p.length(task.b);
  return p.causal ? length - p.queries + row / p.group() : length - 1;
}

// The task's queries, rotated, in tiles of Products::kRows, and each row's last visible key.
template <typename Products>
void load_queries(const Problem& p, const Task& task, Workspace<typename Products::Element>& work) {
  using Element = typename Products::Element;
  constexpr int kRows = Products::kRows;
  const int64_t depth = p.depth(), end = task.first_row + task.rows - 1;
  float* wide = work.sums;  // not in use yet
  Element* narrow = work.keys;
  const Element* rows[kRows];
  for (int64_t tile = 0; tile < task.rows; tile += kRows) {
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = std::min(task.first_row + tile + i, end), token = task.b * p.queries + row / p.group();
      work.last[tile + i] = last_visible(p, task, row);
      with_dtype(p.dtype, [&](auto zero) {
        const auto* from = (const decltype(zero)*)p.q;
        prefetch(from + query_offset(p, task, std::min(row + kRows, end)), p.head_dim);
        convert(from + query_offset(p, task, row), p.head_dim, p.sign, wide);
      });
      if (p.cos) rotate(wide, p.cos + token * p.pairs, p.sin + token * p.pairs, p.pairs, p.half);
      rows[i] = narrow + i * depth;
      convert(wide, p.head_dim, 1.0f, narrow + i * depth);
      for (int64_t d = p.head_dim; d < depth; ++d) narrow[i * depth + d] = Element{};
    }
    Products::put_queries(rows, depth, work.queries + tile * depth);
  }
}

// Scores of keys past each row's last one become -inf; most: raised to the largest of the others.
template <typename Products>
void mask(const int32_t* last, int64_t first_key, int count, float* scores, float* most) {
  for (int w = 0; w < Products::kRows; w += kLanes) {
    const auto visible = load_as<IntVec>(last + w);
    for (int key = 0; key < count; ++key) {
      float* at = scores + key * Products::kRows + w;
      store(at, IntVec{} + (int32_t)(first_key + key) <= visible ? load(at) : splat(-INFINITY));
    }
  }
  raise_to_largest<Products::kRows>(scores, count, most);
}

// Weights of the block's scores, as the right operand of the second product; moves row_max, row_sum and sums, of `depth`
// channels, on. most: the largest score of each row so far.
template <typename Products>
void weigh(const Problem& p, int64_t depth, int count, const float* scores, const float* most, float* row_max, float* row_sum,
           typename Products::Element* weights, float* sums, Fetch& fetch) {
  constexpr int W = Products::kRows / kLanes;
  const float scale = p.scale;  // here, as the weights might be stored over it
  for (int w = 0; w < W; ++w) {
    const float* column = scores + w * kLanes;
    const Vec before = load(row_max + w * kLanes), now = load(most + w * kLanes);
    const Vec decay = exp2((before - now) * scale);
    Vec sum = load(row_sum + w * kLanes) * decay;
    for (int start = 0; start < count; start += kChunk) {  // each chunk by itself first, as in Floats::accumulate
      Vec even_sum{}, odd_sum{};
      for (int key = start; key < start + kChunk; key += 2) {
        fetch(3);
        const Vec even = Products::weight(load(column + key * Products::kRows), now, scale);
        const Vec odd = Products::weight(load(column + (key + 1) * Products::kRows), now, scale);
        even_sum += even;
        odd_sum += odd;
        Products::put_weights(key, w, even, odd, weights);
      }
      sum += even_sum + odd_sum;
    }
    store(row_max + w * kLanes, now);
    store(row_sum + w * kLanes, sum);
    if (any(now != before)) {
      for (int64_t d = 0; d < depth; ++d) {
        float* at = sums + d * Products::kRows + w * kLanes;
        store(at, load(at) * decay);
      }
    }
  }
}

// The task's result: divided by the sums of its weights into `out`, or as it is into `parts`.
template <typename Products>
void finish(const Problem& p, const Task& task, const Workspace<typename Products::Element>& work) {
  constexpr int kRows = Products::kRows;
  const int64_t depth = p.depth(), group = p.group();
  const int64_t parts = ((task.b * p.kv_heads + task.kv_head) * p.part_count() + task.part) * p.rows();
  for (int64_t tile = 0; tile < task.rows; tile += kRows) {
    const int64_t count = std::min<int64_t>(kRows, task.rows - tile);
    const float* sums = work.sums + tile * depth;
    for (int64_t d = 0; d < p.head_dim; d += 16) {
      const uint32_t* from[16];
      float turned[kRows * 16];
      for (int i = 0; i < 16; ++i) from[i] = (const uint32_t*)(sums + (d + i) * kRows);
      transpose<16>(from, kRows, (uint32_t*)turned);
      const int64_t channels = std::min<int64_t>(16, p.head_dim - d);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = task.first_row + tile + i;
        if (p.parts) {
          std::memcpy(p.parts + (parts + row) * p.head_dim + d, turned + i * 16, channels * sizeof(float));
          continue;
        }
        const float sum = work.row_sum[tile + i];
        const int64_t token = task.b * p.queries + row / group;
        const int64_t offset = (token * p.heads + task.kv_head * group + row % group) * p.head_dim + d;
        with_dtype(p.dtype, [&](auto zero) {
          convert(turned + i * 16, channels, sum > 0 ? 1 / sum : 0, (decltype(zero)*)p.out + offset);
        });
      }
    }
    for (int64_t i = 0; p.parts && i < count; ++i) {
      float* statistics = p.statistics + (parts + task.first_row + tile + i) * 2;
      statistics[0] = work.row_max[tile + i];
      statistics[1] = work.row_sum[tile + i];
    }
  }
}

template <typename Products>
void attend(const Problem& p, const Task& task, float* memory) {
  using Element = typename Products::Element;
  constexpr int kRows = Products::kRows;
  Workspace<Element> work(p, memory);
  const int64_t depth = p.depth(), padded = (task.rows + kRows - 1) / kRows * kRows;
  Fetch fetch = fetch_ahead(p, task);
  load_queries<Products>(p, task, work);
  std::fill_n(work.row_max, padded, kLowest);
  std::fill_n(work.row_sum, padded, 0.0f);
  std::fill_n(work.sums, padded * depth, 0.0f);
  const int64_t end = std::min<int64_t>(task.end_key, work.last[padded - 1] + 1);
  for (int64_t first = task.first_key; first < end; first += kBlock) {
    const int64_t keys = std::min<int64_t>(kBlock, end - first);
    switch (p.cache_dtype) {
      case kFloat32: load_block<Products, float>(p, task, first, keys, work, fetch); break;
      case kBFloat16: load_block<Products, bfloat16>(p, task, first, keys, work, fetch); break;
      case kFloat16: load_block<Products, float16>(p, task, first, keys, work, fetch); break;
      case kInt8: load_block<Products, int8_t>(p, task, first, keys, work, fetch); break;
    }
    const int count = (keys + kChunk - 1) / kChunk * kChunk;
    for (int64_t tile = 0; tile < padded; tile += kRows) {
      int32_t* last = work.last + tile;
      if (last[kRows - 1] < first) continue;
      float *sums = work.sums + tile * depth, *row_max = work.row_max + tile, most[kRows];
      std::copy_n(row_max, kRows, most);
      Products::score(work.queries + tile * depth, work.keys, count, depth, work.scores, most, fetch);
      if (first + count - 1 > std::min<int64_t>(last[0], end - 1)) {
        int32_t bounded[kRows];
        for (int i = 0; i < kRows; ++i) bounded[i] = std::min<int64_t>(last[i], end - 1);
        std::copy_n(row_max, kRows, most);
        mask<Products>(bounded, first, count, work.scores, most);
      }
      weigh<Products>(p, depth, count, work.scores, most, row_max, work.row_sum + tile, work.weights, sums, fetch);
      Products::accumulate(work.values, work.weights, count, depth, sums, fetch);
    }
  }
  finish<Products>(p, task, work);
}

// With tiles of one vector of rows where those are all.
template <template <int> typename Products>
void attend_narrow_or_wide(const Problem& p, const Task& task, float* memory) {
  task.rows <= kLanes ? attend<Products<1>>(p, task, memory) : attend<Products<kWide>>(p, task, memory);
}

#if defined(__AVX2__)

constexpr int kFew = 8;  // rows: heads that share a KV head, of one new token

// Rows that fit, rotated already.
bool are_few(const Problem& p) {
#if defined(__AVX512BF16__)
  if (p.dtype != kBFloat16) return false;
#endif
  return p.rows() <= kFew && p.parts && p.part_keys <= kBlock && p.head_dim % kChunk == 0 && !p.cos;
}

#if defined(__AVX512BF16__)
using FewRows = Pairs<1>;

// Channels that are multiplied at once, from keys or values of From.
inline __m512i load_part(const bfloat16* from, float) { return _mm512_loadu_si512(from); }
inline __m512i load_part(const int8_t* from, float scale) {
  const Vec first = load(from) * scale, last = load(from + kLanes) * scale;
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first);
}

// A row of queries, for keys of From.
template <typename From, typename T>
void put_query(const T* from, int64_t count, float scale, bfloat16* to) {
  convert(from, count, scale, to);
}
#else
using FewRows = Floats<1>;

// Channels that are multiplied at once, from keys or values of From.
template <typename From>
inline TwoVecs load_part(const From* from, float scale) {
  const TwoVecs part = load_two(from);
  return std::is_same_v<From, int8_t> ? TwoVecs{part.first * scale, part.second * scale} : part;
}

// A row of queries, for keys of From: in the order of load_part.
template <typename From, typename T>
void put_query(const T* from, int64_t count, float scale, float* to) {
  for (int64_t d = 0; d < count; d += 2 * kLanes) {
    TwoVecs part;
    if constexpr (std::is_same_v<From, bfloat16>) {
      part = load_two(from + d);
    } else {
      part = {load(from + d), load(from + d + kLanes)};
    }
    store(to + d, part.first * scale);
    store(to + d + kLanes, part.second * scale);
  }
}
#endif

// Calls body(N) with the constant N = rows.
template <typename Body>
void with_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    case 8: return body(std::integral_constant<int, 8>{});
  }
}

// Where a part's keys or values lie, and their scales.
template <typename From>
struct PartRows {
  const From* rows[kBlock];
  float scales[kBlock];

  // What is past the last of `keys` is the last one again, up to `count`.
  PartRows(const Problem& p, const Cache& cache, const Task& task, int keys, int count) {
    Place place(p, task.b, task.first_key);
    for (int i = 0; i < keys;) {
      const int end = (int)std::min<int64_t>(keys, i + place.left());
      const From* row = (const From*)cache.data + place.element(cache) + task.kv_head * cache.head;
      const float* scale = cache.scales + (place.page() * p.page_size + place.slot()) * p.kv_heads + task.kv_head;
      place.skip(end - i);
      for (; i < end; ++i, row += cache.slot, scale += p.kv_heads) {
        rows[i] = row;
        if constexpr (std::is_same_v<From, int8_t>) scales[i] = *scale;
      }
    }
    for (int i = keys; i < count; ++i) rows[i] = rows[keys - 1], scales[i] = scales[keys - 1];
  }
};

// A part of the keys for a few rows: read where they lie, as laying them out costs more than so few products.
template <typename From>
void attend_few(const Problem& p, const Task& task, float* memory) {
  using Products = FewRows;
  Workspace<Products::Element> work(p, memory);
  Fetch fetch = fetch_ahead(p, task);
  Products::Element* queries = work.queries;
  for (int64_t row = 0; row < p.rows(); ++row)
    with_dtype(p.dtype, [&](auto zero) {
      put_query<From>((const decltype(zero)*)p.q + query_offset(p, task, row), p.head_dim, p.sign, queries + row * p.head_dim);
    });
  int32_t last[Products::kRows];
  for (int64_t i = 0; i < Products::kRows; ++i)
    last[i] = std::min(last_visible(p, task, std::min(i, p.rows() - 1)), task.end_key - 1);
  std::fill_n(work.row_max, Products::kRows, kLowest);
  std::fill_n(work.row_sum, Products::kRows, 0.0f);
  const int keys = (int)std::max<int64_t>(0, last[Products::kRows - 1] + 1 - task.first_key);
  const int count = (keys + kChunk - 1) / kChunk * kChunk;
  const PartRows<From> key_rows(p, p.keys, task, keys, count), value_rows(p, p.values, task, keys, count);
  const auto score = [&](auto rows) {
    for (int i = 0; i < count; i += 2) {
      fetch(6);
      const auto key = [&](int k, int64_t d) { return load_part(key_rows.rows[i + k] + d, key_rows.scales[i + k]); };
      score_few<decltype(rows)::value>(queries, p.head_dim, key, work.scores + i * Products::kRows);
    }
  };
  with_rows(p.rows(), score);
  float most[Products::kRows];
  std::copy_n(work.row_max, Products::kRows, most);
  mask<Products>(last, task.first_key, count, work.scores, most);
  const auto weigh_by = [&](auto products) {
    weigh<decltype(products)>(p, 0, count, work.scores, most, work.row_max, work.row_sum, work.weights, nullptr, fetch);
  };
#if defined(__AVX512BF16__)
  weigh_by(Products());
#else
  p.dtype == kBFloat16 ? weigh_by(CoarseFloats<1>()) : weigh_by(Products());
#endif
  const int64_t first = ((task.b * p.kv_heads + task.kv_head) * p.part_count() + task.part) * p.rows();
  float* out = p.parts + first * p.head_dim;
  const auto value = [&](int key, int64_t d) { return load_part(value_rows.rows[key] + d, value_rows.scales[key]); };
  const auto accumulate = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
#if defined(__AVX512BF16__)
    accumulate_few<R>(work.weights, count, p.head_dim, value, out, p.head_dim, fetch);
#else
    const auto put = [&](int row, int64_t d, TwoVecs sums) { store_sums<From>(out + row * p.head_dim + d, sums); };
    accumulate_few<R>(work.weights, count, p.head_dim, value, put, fetch);
#endif
  };
  with_rows(p.rows(), accumulate);
  for (int64_t i = 0; i < p.rows(); ++i) {
    p.statistics[(first + i) * 2] = work.row_max[i];
    p.statistics[(first + i) * 2 + 1] = work.row_sum[i];
  }
}

#endif

void run(const Problem& p, const Task& task, float* memory) {
#if defined(__AVX2__)
  if (are_few(p)) {
    if (p.cache_dtype == kInt8) return attend_few<int8_t>(p, task, memory);
    if (p.cache_dtype == kBFloat16) return attend_few<bfloat16>(p, task, memory);
#if !defined(__AVX512BF16__)
    if (p.cache_dtype == kFloat16) return attend_few<float16>(p, task, memory);
    return attend_few<float>(p, task, memory);
#endif
  }
#endif
#if defined(__AMX_BF16__)
  if (p.dtype == kBFloat16) return attend_narrow_or_wide<Tiles>(p, task, memory);
#elif defined(__AVX512BF16__)
  if (p.dtype == kBFloat16) return attend_narrow_or_wide<Pairs>(p, task, memory);
#else
  if (p.dtype == kBFloat16) return attend_narrow_or_wide<CoarseFloats>(p, task, memory);
#endif
  attend_narrow_or_wide<Floats>(p, task, memory);
}

// One row's result from those of all parts of its keys.
void merge(const Problem& p, int64_t b, int64_t kv_head, int64_t row, float* sums) {
  const int64_t count = p.part_count(), rows = p.rows(), group = p.group();
  const int64_t first = (b * p.kv_heads + kv_head) * count * rows + row;
  float most = kLowest, sum = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, p.statistics[(first + i * rows) * 2]);
  std::fill_n(sums, p.head_dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t part = first + i * rows;
    if (p.statistics[part * 2 + 1] == 0) continue;
    const float weight = std::exp2((p.statistics[part * 2] - most) * p.scale);
    sum += weight * p.statistics[part * 2 + 1];
    for (int64_t d = 0; d < p.head_dim; ++d) sums[d] += weight * p.parts[part * p.head_dim + d];
  }
  const int64_t token = b * p.queries + row / group;
  const int64_t offset = (token * p.heads + kv_head * group + row % group) * p.head_dim;
  with_dtype(p.dtype, [&](auto zero) {
    convert(sums, p.head_dim, sum > 0 ? 1 / sum : 0, (decltype(zero)*)p.out + offset);
  });
}

}  // namespace
}  // namespace afnext

// workspace: [threads, workspace_row] float32, for each thread what Workspace takes and 16 for its alignment.
AFNEXT_EXPORT void afnext_attention(
    const char* q, const char* k, const char* v, char* out, const float* k_scales, const float* v_scales,
    const float* cos, const float* sin, const int64_t* key_lengths, const int32_t* page_table, float* workspace,
    float* parts, float* statistics, int64_t batch, int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
    int64_t max_keys, int64_t page_size, int64_t table_row, int64_t pairs, int64_t half, int64_t causal, int64_t q_batch,
    int64_t q_token, int64_t q_head, int64_t k_page, int64_t k_slot, int64_t k_head, int64_t v_page, int64_t v_slot,
    int64_t v_head, int64_t row_block, int64_t part_keys, int64_t workspace_row, double scale, int64_t dtype,
    int64_t threads) {
  using namespace afnext;
  Problem p{};
  p.q = q;
  p.out = out;
  p.keys = {k, k_scales, k_page, k_slot, k_head};
  p.values = {v, v_scales, v_page, v_slot, v_head};
  p.cos = cos;
  p.sin = sin;
  p.key_lengths = key_lengths;
  p.page_table = page_table;
  p.parts = parts;
  p.statistics = statistics;
  p.batch = batch;
  p.queries = queries;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  // The caller may know no more than what there is room for, and parts without keys would go to one of the threads.
  p.max_keys = key_lengths ? std::min(max_keys, *std::max_element(key_lengths, key_lengths + batch)) : max_keys;
  p.page_size = page_size;
  p.table_row = table_row;
  p.pairs = pairs;
  p.half = half;
  p.causal = causal;
  p.q_batch = q_batch;
  p.q_token = q_token;
  p.q_head = q_head;
  p.dtype = dtype;
  p.cache_dtype = k_scales ? (int64_t)kInt8 : dtype;
  p.row_block = row_block;
  p.part_keys = part_keys;
  p.sign = scale > 0 ? 1 : scale < 0 ? -1 : 0;
  p.scale = scale == 0 ? 1 : std::fabs(scale) * 1.4426950408889634;

  const int64_t part_count = p.part_count(), blocks = (p.rows() + row_block - 1) / row_block;
  const int64_t tasks = batch * part_count * blocks * kv_heads;
#pragma omp parallel num_threads(threads) if (tasks > 1)
  {
#if defined(__AMX_BF16__)
    TileConfiguration tiles;
#endif
    float* memory = workspace + omp_get_thread_num() * workspace_row;
    // With parts, a thread has neighbouring ones, of which it fetches the next while it works on one.
    const int64_t together = parts ? (tasks / kv_heads + threads - 1) / threads * kv_heads : 1;
#pragma omp for schedule(dynamic, together)
    for (int64_t i = 0; i < tasks; ++i) {
      Task task;
      task.kv_head = i % kv_heads;
      // Later rows have more keys: the longest tasks go first, so that the last to finish are short.
      task.first_row = (blocks - 1 - i / kv_heads % blocks) * row_block;
      task.rows = std::min(row_block, p.rows() - task.first_row);
      task.part = i / kv_heads / blocks % part_count;
      task.b = i / kv_heads / blocks / part_count;
      task.first_key = task.part * part_keys;
      task.end_key = part_keys ? std::min(p.length(task.b), task.first_key + part_keys) : p.length(task.b);
      run(p, task, memory);
    }
    if (parts) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < batch * kv_heads * p.rows(); ++i) {
        merge(p, i / p.rows() / kv_heads, i / p.rows() % kv_heads, i % p.rows(), memory);
      }
    }
  }
}
