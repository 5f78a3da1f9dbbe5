// Attention over many queries or few, dense or paged: see attention.py and decode_attention.py for the maths.
//
// The query heads of a KV head are neighbouring rows: row r of a KV head is query r / group of its head r % group. A task
// is a block of rows, a KV head, a sequence and a part of its keys. It loops over blocks of its keys and, for each
// block, over tiles of its rows, with a running maximum and sum (online softmax) and exponentials of base 2.
// Keys and values of a block are converted and laid out once for all rows of the task. If the keys are divided into
// parts, each task writes its unnormalized sums, and a second pass merges the parts.

#include <algorithm>
#include <cmath>

#include "attention_few.h"
#include "attention_int8.h"
#include "attention_rows.h"
#include "float8.h"
#include "int4_rows.h"
#include "shared_loop.h"

namespace afnext {
namespace {

template <typename Element, typename From>
const Element* converted(const From* from, float scale, int64_t head_dim, int64_t depth, Element* staged) {
  convert(from, head_dim, scale, staged);
  for (int64_t d = head_dim; d < depth; ++d) staged[d] = Element{};
  return staged;
}

// One row as `Element`, padded with zeros after head_dim; the row itself if it has this form already.
template <typename Element, typename From>
const Element* row_as(const From* from, float scale, int64_t head_dim, int64_t depth, Element* staged) {
  if constexpr (std::is_same_v<Element, From>) {
    if (head_dim == depth) return from;
  }
  return converted(from, scale, head_dim, depth, staged);
}

// One int4 row as floats, transformed back: keys always, values unless they are summed in parts, whose sum is then
// transformed instead.
class Int4Rows {
 public:
  Int4Rows(const Problem& p, const Cache& cache, const Task& task)
      : p_(p), keys_(&cache == &p.keys), transforms_(keys_ || !p.parts) {
    if (keys_ && p.k_bias)
      with_dtype(p.dtype, [&](auto zero) {
        convert((const decltype(zero)*)p.k_bias + task.kv_head * p.head_dim, p.head_dim, 1.0f, bias_);
      });
  }

  const float* operator()(const Int4Pair* from, float scale, int64_t token) {
    expand_int4(from, p_.head_dim, scale, row_);
    if (transforms_) walsh_hadamard(row_, p_.head_dim);
    if (keys_ && p_.k_bias) {
      const int64_t half = p_.head_dim / 2;
      const float *cos = p_.key_cos + token * p_.turn_row, *sin = p_.key_sin + token * p_.turn_row;
      for (int64_t d = 0; d < half; ++d) {
        row_[d] += bias_[d] * cos[d] - bias_[half + d] * sin[d];
        row_[half + d] += bias_[half + d] * cos[d] + bias_[d] * sin[d];
      }
    }
    return row_;
  }

 private:
  const Problem& p_;
  const bool keys_, transforms_;
  float bias_[kMaxHeadDim], row_[kMaxHeadDim];
};

struct Nothing {
  Nothing(const Problem&, const Cache&, const Task&) {}
};

// Calls put(rows, chunk) for each chunk of keys first .. first + count - 1, with zeros past the last key.
template <typename Element, typename From, typename Put>
void for_chunks(const Problem& p, const Cache& cache, const Task& task, int64_t first, int64_t count,
                Workspace<Element>& work, Put put) {
  const int64_t depth = p.depth();
  Element* zeros = work.staged + kChunk * depth;
  std::memset((void*)zeros, 0, depth * sizeof(Element));
  const auto at = [&](const Place& place) {
    return (const From*)cache.data + place.element(cache) + task.kv_head * cache.head;
  };
  std::conditional_t<std::is_same_v<From, Int4Pair>, Int4Rows, Nothing> int4(p, cache, task);
  Place place(p, task.b, first), later(p, task.b, first + kChunk);
  for (int64_t start = 0; start < count; start += kChunk) {
    const Element* rows[kChunk];
    for (int64_t i = 0; i < kChunk; ++i) {
      if (start + i >= count) {
        rows[i] = zeros;
        continue;
      }
      float scale = 1;
      if (cache.scales) scale = cache.scales[(place.page() * p.page_size + place.slot()) * p.kv_heads + task.kv_head];
      if (start + i + kChunk < count) {
        prefetch(at(later), p.cache_row());
        later.next();
      }
      Element* staged = work.staged + i * depth;
      if constexpr (std::is_same_v<From, Int4Pair>) {
        rows[i] = converted(int4(at(place), scale, first + start + i), 1.0f, p.head_dim, depth, staged);
      } else {
        rows[i] = row_as(at(place), scale, p.head_dim, depth, staged);
      }
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
      const int64_t row = std::min(task.first_row + tile + i, end);
      work.last[tile + i] = last_visible(p, task, row);
      load_query(p, task, row, std::min(row + kRows, end), wide);
      rows[i] = narrow + i * depth;
      convert(wide, p.head_dim, 1.0f, narrow + i * depth);
      for (int64_t d = p.head_dim; d < depth; ++d) narrow[i * depth + d] = Element{};
    }
    Products::put_queries(rows, depth, work.queries + tile * depth);
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
      case kInt4: load_block<Products, Int4Pair>(p, task, first, keys, work, fetch); break;
      case kFloat8: load_block<Products, float8>(p, task, first, keys, work, fetch); break;
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
      weigh<Products>(p.scale, depth, count, work.scores, most, row_max, work.row_sum + tile, work.weights, sums,
                      fetch);
      Products::accumulate(work.values, work.weights, count, depth, sums, fetch);
    }
  }
  finish<kRows>(p, task, depth, work);
}

// Uses tiles of one vector if all rows fit in one vector.
template <template <int> typename Products>
void attend_narrow_or_wide(const Problem& p, const Task& task, float* memory) {
  task.rows <= kLanes ? attend<Products<1>>(p, task, memory) : attend<Products<kWide>>(p, task, memory);
}

void run(const Problem& p, const Task& task, float* memory) {
#if defined(AFNEXT_PANELS)
  if (are_few(p)) {
    if (p.cache_dtype == kInt4) return attend_few<Int4Pair>(p, task, memory);
    if (p.cache_dtype == kInt8) return attend_few<int8_t>(p, task, memory);
    if (p.cache_dtype == kFloat8) return attend_few<float8>(p, task, memory);
    if (p.cache_dtype == kBFloat16) return attend_few<bfloat16>(p, task, memory);
#if !defined(__AVX512BF16__)
    if (p.cache_dtype == kFloat16) return attend_few<float16>(p, task, memory);
    return attend_few<float>(p, task, memory);
#endif
  }
#endif
#if defined(AFNEXT_INT8_ATTENTION)
  if (takes_int8(p)) return attend_int8(p, task, memory);
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

// Merges the results of all parts of the keys of one row.
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
  if (p.cache_dtype == kInt4) walsh_hadamard(sums, p.head_dim);
  const int64_t token = b * p.queries + row / group;
  const int64_t offset = (token * p.heads + kv_head * group + row % group) * p.head_dim;
  with_dtype(p.dtype,
             [&](auto zero) { convert(sums, p.head_dim, sum > 0 ? 1 / sum : 0, (decltype(zero)*)p.out + offset); });
}

}  // namespace
}  // namespace afnext

// workspace: [threads, workspace_row] float32, for each thread the size of Workspace and 16 floats for its alignment.
AFNEXT_EXPORT void afnext_attention(const char* q, const char* k, const char* v, char* out, const float* k_scales,
                                    const float* v_scales, const void* k_bias, const float* key_cos,
                                    const float* key_sin, const float* cos, const float* sin,
                                    const int64_t* key_lengths, const int32_t* page_table, float* workspace,
                                    float* parts, float* statistics, int64_t batch, int64_t queries, int64_t heads,
                                    int64_t kv_heads, int64_t head_dim, int64_t max_keys, int64_t page_size,
                                    int64_t table_row, int64_t turn_row, int64_t pairs, int64_t half, int64_t causal,
                                    int64_t int4, int64_t e4m3, int64_t rounds, int64_t q_batch, int64_t q_token,
                                    int64_t q_head, int64_t k_page, int64_t k_slot, int64_t k_head, int64_t v_page,
                                    int64_t v_slot, int64_t v_head, int64_t row_block, int64_t part_keys,
                                    int64_t workspace_row, double scale, int64_t dtype, int64_t threads) {
  using namespace afnext;
  Problem p{};
  p.q = q;
  p.out = out;
  p.keys = {k, k_scales, k_page, k_slot, k_head};
  p.values = {v, v_scales, v_page, v_slot, v_head};
  p.k_bias = k_bias;
  p.key_cos = key_cos;
  p.key_sin = key_sin;
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
  // The caller may know only an upper bound of the lengths, and one thread would get all the parts without keys.
  p.max_keys = key_lengths ? std::min(max_keys, *std::max_element(key_lengths, key_lengths + batch)) : max_keys;
  p.page_size = page_size;
  p.table_row = table_row;
  p.turn_row = turn_row;
  p.pairs = pairs;
  p.half = half;
  p.causal = causal;
  p.rounds = rounds;
  p.q_batch = q_batch;
  p.q_token = q_token;
  p.q_head = q_head;
  p.dtype = dtype;
  p.cache_dtype = int4 ? (int64_t)kInt4 : e4m3 ? (int64_t)kFloat8 : k_scales ? (int64_t)kInt8 : dtype;
  p.row_block = row_block;
  p.part_keys = part_keys;
  p.sign = scale > 0 ? 1 : scale < 0 ? -1 : 0;
  p.scale = scale == 0 ? 1 : std::fabs(scale) * 1.4426950408889634;

  const int64_t part_count = p.part_count(), blocks = (p.rows() + row_block - 1) / row_block;
  const int64_t tasks = batch * part_count * blocks * kv_heads;
  SharedLoop loop(tasks / kv_heads, 1, threads);
#pragma omp parallel num_threads(threads) if (tasks > 1)
  {
#if defined(__AMX_BF16__)
    TileConfiguration tiles;
#endif
    float* memory = workspace + omp_get_thread_num() * workspace_row;
    const auto compute = [&](int64_t i) {
      Task task;
      task.kv_head = i % kv_heads;
      // Later rows have more keys. The longest tasks run first, so that the last tasks are short.
      task.first_row = (blocks - 1 - i / kv_heads % blocks) * row_block;
      task.rows = std::min(row_block, p.rows() - task.first_row);
      task.part = i / kv_heads / blocks % part_count;
      task.b = i / kv_heads / blocks / part_count;
      task.first_key = task.part * part_keys;
      task.end_key = part_keys ? std::min(p.length(task.b), task.first_key + part_keys) : p.length(task.b);
      run(p, task, memory);
    };
    if (!parts) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tasks; ++i) compute(i);
    } else {
      // A thread has neighbouring parts and prefetches the next while it computes one.
      loop.run([&](int64_t first, int64_t end) {
        for (int64_t i = first * kv_heads; i < end * kv_heads; ++i) compute(i);
      });
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < batch * kv_heads * p.rows(); ++i) {
        merge(p, i / p.rows() / kv_heads, i / p.rows() % kv_heads, i % p.rows(), memory);
      }
    }
  }
}
