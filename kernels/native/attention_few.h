// Attention of few rows: the query heads that share a KV head, for one or a few new tokens. Keys and values are read in
// place, because copying them to another layout costs more than so few products. Channels are the lanes.

#pragma once

#include <type_traits>

#include "attention_task.h"
#include "elementwise.h"
#include "float8.h"
#include "int4_rows.h"
#include "rows.h"

#if defined(AFNEXT_PANELS)

namespace afnext {

constexpr int kFew = 8;  // rows: heads that share a KV head, of one new token

template <typename From>
constexpr bool kQuantized =
    std::is_same_v<From, int8_t> || std::is_same_v<From, float8> || std::is_same_v<From, Int4Pair>;

// Channels d .. d + 2 * kLanes - 1 of an int4 row, all in the same half, still transformed.
inline TwoVecs load_int4(const Int4Pair* row, int64_t d, int64_t head_dim, float scale) {
  const int64_t half = head_dim / 2;
  const int shift = d < half ? 0 : 4;
  const Int4Pair* from = row + (d < half ? d : d - half);
  const auto channels = [&](const Int4Pair* at) {
    return to_float((IntVec)(widen(load_as<UByteVec>(at)) >> shift & 15)) * (2 * scale) - 15 * scale;
  };
  return {channels(from), channels(from + kLanes)};
}

// Whether there are few enough rows, which need no rotation.
inline bool are_few(const Problem& p) {
#if defined(__AVX512BF16__)
  if (p.dtype != kBFloat16) return false;
#endif
  return p.rows() <= kFew && p.parts && p.part_keys <= kBlock && p.cache_row() % kChunk == 0 && !p.cos;
}

#if defined(__AVX512F__)
// The scores of two keys, [2][kLanes], from sums in lanes: eight rows of the first key, and eight of the second.
inline void store_scores_of_two(const Vec* sums, float* scores) {
  __m512 x[16];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)sums[i], b = (__m512)sums[i + 8];
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(x[i]), b = _mm512_castps_pd(x[i + 4]);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Every four lanes now hold partial sums of the vectors i, i + 8, i + 4, i + 12.
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 2], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 2], 0xdd));
  const __m512 last = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
  const __m512i order = _mm512_set_epi32(15, 7, 11, 3, 13, 5, 9, 1, 14, 6, 10, 2, 12, 4, 8, 0);
  const __m512 all = _mm512_permutexvar_ps(order, last);
  _mm512_storeu_ps(scores, _mm512_maskz_mov_ps(0x00ff, all));
  _mm512_storeu_ps(scores + kLanes, _mm512_maskz_compress_ps(0xff00, all));
}
#elif defined(AFNEXT_NEON)
// The sums of the lanes of eight vectors.
inline void store_sums_of_lanes(const Vec (&x)[8], float* sums) {
  const auto four = [&](int i) {
    const auto pair = [&](int j) { return vpaddq_f32((float32x4_t)x[j], (float32x4_t)x[j + 1]); };
    return (Vec)vpaddq_f32(pair(i), pair(i + 2));
  };
  store(sums, four(0));
  store(sums + kLanes, four(4));
}
#else
// The sums of the lanes of eight vectors.
inline void store_sums_of_lanes(const Vec (&x)[8], float* sums) {
  const auto pair = [&](int i) { return _mm256_hadd_ps((__m256)x[i], (__m256)x[i + 1]); };
  const __m256 first = _mm256_hadd_ps(pair(0), pair(2)), last = _mm256_hadd_ps(pair(4), pair(6));
  store(sums, (Vec)_mm256_permute2f128_ps(first, last, 0x20) + (Vec)_mm256_permute2f128_ps(first, last, 0x31));
}
#endif

#if defined(__AVX512BF16__)
constexpr int kFewVecs = 1;
using FewRows = Pairs<kFewVecs>;

// Channels that are multiplied at once, from keys or values of From.
inline __m512i load_part(const bfloat16* from, float) { return _mm512_loadu_si512(from); }
inline __m512i narrowed(Vec first, Vec last) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first); }
template <typename Code>
inline __m512i load_part(const Code* from, float scale) {
  return narrowed(load(from) * scale, load(from + kLanes) * scale);
}
inline __m512i load_part(const float* from, float) { return narrowed(load(from), load(from + kLanes)); }

template <typename From>
__m512i part_of(const From* row, int64_t d, int64_t head_dim, float scale) {
  if constexpr (std::is_same_v<From, Int4Pair>) {
    const TwoVecs part = load_int4(row, d, head_dim, scale);
    return narrowed(part.first, part.second);
  } else {
    return load_part(row + d, scale);
  }
}

// A row of queries, for keys of From.
template <typename From, typename T>
void put_query(const T* from, int64_t count, float scale, bfloat16* to) {
  convert(from, count, scale, to);
}

// The first product for R rows and two keys, with channels as the lanes: scores[k * kLanes + r], zero in lanes past R.
// queries: [R][channels]; key(k, d): the bfloat16 of the channels d .. d + 31.
template <int R, typename Key>
inline void score_few(const bfloat16* queries, int64_t channels, Key key, float* scores) {
  Vec total[16] = {};
  for (int64_t d = 0; d < channels; d += 32) {
    const __m512bh first = (__m512bh)key(0, d), second = (__m512bh)key(1, d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh query = (__m512bh)_mm512_loadu_si512(queries + r * channels + d);
      total[r] = (Vec)_mm512_dpbf16_ps((__m512)total[r], query, first);
      total[8 + r] = (Vec)_mm512_dpbf16_ps((__m512)total[8 + r], query, second);
    }
  }
  store_scores_of_two(total, scores);
}

// The second product for R rows, with channels as the lanes: out[r * pitch + d] = sum_key weights[key][r] * value(key)[d].
// weights: of Pairs<1>; value(key, d): the bfloat16 of the channels d .. d + 31.
template <int R, typename Value>
inline void accumulate_few(const bfloat16* weights, int count, int64_t channels, Value value, float* out, int64_t pitch,
                           Fetch& fetch) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i last = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int64_t d = 0; d < channels; d += 32) {
    __m512 low[R], high[R];  // the first and last four of each eight channels
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int key = 0; key < count; key += 2) {
      fetch(2);
      const __m512i even = value(key, d), odd = value(key + 1, d);
      const __m512bh pairs[2] = {(__m512bh)_mm512_unpacklo_epi16(even, odd),
                                 (__m512bh)_mm512_unpackhi_epi16(even, odd)};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, weights + key * kLanes + 2 * r, sizeof pair);
        const __m512bh all = (__m512bh)_mm512_set1_epi32(pair);
        low[r] = _mm512_dpbf16_ps(low[r], pairs[0], all);
        high[r] = _mm512_dpbf16_ps(high[r], pairs[1], all);
      }
    }
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(out + r * pitch + d, _mm512_permutex2var_ps(low[r], first, high[r]));
      _mm512_storeu_ps(out + r * pitch + d + 16, _mm512_permutex2var_ps(low[r], last, high[r]));
    }
  }
}
#else
constexpr int kFewVecs = kFew <= kLanes ? 1 : kFew / kLanes;  // of a key's scores
using FewRows = Floats<kFewVecs>;

// Channels that are multiplied at once, from keys or values of From.
template <typename From>
inline TwoVecs load_part(const From* from, float scale) {
  const TwoVecs part = load_two(from);
  return kQuantized<From> ? TwoVecs{part.first * scale, part.second * scale} : part;
}

template <typename From>
TwoVecs part_of(const From* row, int64_t d, int64_t head_dim, float scale) {
  if constexpr (std::is_same_v<From, Int4Pair>) {
    return load_int4(row, d, head_dim, scale);
  } else {
    return load_part(row + d, scale);
  }
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

// Two keys, or halves, at once: as many sums as fit in registers.
constexpr int kTogether = kLanes == 8 ? 1 : 2;

// The first product for R rows and two keys, with channels as the lanes: scores[k * FewRows::kRows + r], zero past R.
// queries: [R][channels]; key(k, d): the channels d .. d + 2 * kLanes - 1, in the same order.
template <int R, typename Key>
inline void score_few(const float* queries, int64_t channels, Key key, float* scores) {
  Vec total[2][8] = {};
#pragma GCC unroll 2
  for (int first = 0; first < 2; first += kTogether)
    for (int64_t d = 0; d < channels; d += 2 * kLanes) {
      TwoVecs part[2];
      for (int k = first; k < first + kTogether; ++k) part[k] = key(k, d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float* query = queries + r * channels + d;
        for (int k = first; k < first + kTogether; ++k) total[k][r] += part[k].first * load(query);
        for (int k = first; k < first + kTogether; ++k) total[k][r] += part[k].second * load(query + kLanes);
      }
    }
#if defined(__AVX512F__)
  store_scores_of_two(total[0], scores);
#else
  for (int k = 0; k < 2; ++k) store_sums_of_lanes(total[k], scores + k * FewRows::kRows);
#endif
}

// The second product for R rows, with channels as the lanes: sum_key weights[key][r] * value(key, d) goes to put(r, d, sums).
// weights: of FewRows; value(key, d): the channels d .. d + 2 * kLanes - 1, in the order that `put` expects.
template <int R, typename Value, typename Put>
inline void accumulate_few(const float* weights, int count, int64_t channels, Value value, Put put, Fetch& fetch) {
  for (int64_t d = 0; d < channels; d += 2 * kLanes) {
    Vec total[2][R] = {};
#pragma GCC unroll 2
    for (int first = 0; first < 2; first += kTogether)
      for (int key = 0; key < count; ++key) {
        if (key % 2) fetch(kTogether);
        const TwoVecs part = value(key, d);
        const Vec halves[2] = {part.first, part.second};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec by = splat(weights[key * FewRows::kRows + r]);
          for (int half = first; half < first + kTogether; ++half) total[half][r] += halves[half] * by;
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) put(r, d, TwoVecs{total[0][r], total[1][r]});
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

// Addresses of a part's keys or values and, of a quantized cache, of their scales.
template <typename From>
struct PartRows {
  const From* rows[kBlock];
  float scales[kBlock];

  // Past the last of `keys`, the last key is repeated, up to `count`.
  PartRows(const Problem& p, const Cache& cache, const Task& task, int keys, int count) {
    Place place(p, task.b, task.first_key);
    for (int i = 0; i < keys;) {
      const int run = (int)std::min<int64_t>(keys - i, place.left());
      const From* row = (const From*)cache.data + place.element(cache) + task.kv_head * cache.head;
      for (int j = 0; j < run; ++j) rows[i + j] = row + j * cache.slot;
      if constexpr (kQuantized<From>) {
        const float* scale = cache.scales + (place.page() * p.page_size + place.slot()) * p.kv_heads + task.kv_head;
        for (int j = 0; j < run; ++j) scales[i + j] = scale[j * p.kv_heads];
      }
      place.skip(run);
      i += run;
    }
    for (int i = keys; i < count; ++i) {
      rows[i] = rows[keys - 1];
      if constexpr (kQuantized<From>) scales[i] = scales[keys - 1];
    }
  }
};

// A row of queries for int4 keys: transformed like the keys, and its products with the bias that the stored keys lack.
// With the cosines and sines of a token, these add up to the product of query and bias.
template <typename Element>
void put_int4_query(const Problem& p, const Task& task, int64_t row, Element* query, Element* turned) {
  const int64_t half = p.head_dim / 2;
  float x[kMaxHeadDim], bias[kMaxHeadDim], sums[kMaxHeadDim];
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    convert((const T*)p.q + query_offset(p, task, row), p.head_dim, p.sign, x);
    if (p.k_bias) convert((const T*)p.k_bias + task.kv_head * p.head_dim, p.head_dim, 1.0f, bias);
  });
  if (p.k_bias) {
    for (int64_t d = 0; d < half; ++d) {
      sums[d] = x[d] * bias[d] + x[half + d] * bias[half + d];
      sums[half + d] = x[half + d] * bias[d] - x[d] * bias[half + d];
    }
    put_query<Int4Pair>(sums, p.head_dim, 1.0f, turned);
  }
  walsh_hadamard(x, p.head_dim);
  put_query<Int4Pair>(x, p.head_dim, 1.0f, query);
}

// Adds the contribution of the int4 keys' bias to the scores of the keys from `first` on.
template <int R, typename Element>
void add_bias_scores(const Problem& p, int64_t first, int keys, int count, const Element* turned, float* scores) {
  const int64_t half = p.head_dim / 2;
  float two[2 * FewRows::kRows];
  for (int i = 0; i < count; i += 2) {
    const auto key = [&](int k, int64_t d) {
      const int64_t token = first + std::min(i + k, keys - 1);
      return load_part(d < half ? p.key_cos + token * p.turn_row + d : p.key_sin + token * p.turn_row + d - half, 1.0f);
    };
    score_few<R>(turned, p.head_dim, key, two);
    for (int k = 0; k < 2; ++k)
      for (int w = 0; w < FewRows::kRows; w += kLanes) {
        float* at = scores + (i + k) * FewRows::kRows + w;
        store(at, load(at) + load(two + k * FewRows::kRows + w));
      }
  }
}

// A part of the keys for few rows, read in place.
template <typename From>
void attend_few(const Problem& p, const Task& task, float* memory) {
  using Products = FewRows;
  Workspace<Products::Element> work(p, memory);
  Fetch fetch = fetch_ahead(p, task);
  Products::Element *queries = work.queries, *turned = queries + kFew * p.head_dim;
  for (int64_t row = 0; row < p.rows(); ++row) {
    Products::Element* query = queries + row * p.head_dim;
    if constexpr (std::is_same_v<From, Int4Pair>) {
      put_int4_query(p, task, row, query, turned + row * p.head_dim);
    } else {
      with_dtype(p.dtype, [&](auto zero) {
        put_query<From>((const decltype(zero)*)p.q + query_offset(p, task, row), p.head_dim, p.sign, query);
      });
    }
  }
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
      const auto key = [&](int k, int64_t d) {
        return part_of(key_rows.rows[i + k], d, p.head_dim, key_rows.scales[i + k]);
      };
      score_few<decltype(rows)::value>(queries, p.head_dim, key, work.scores + i * Products::kRows);
    }
    if (std::is_same_v<From, Int4Pair> && p.k_bias)
      add_bias_scores<decltype(rows)::value>(p, task.first_key, keys, count, turned, work.scores);
  };
  with_rows(p.rows(), score);
  float most[Products::kRows];
  std::copy_n(work.row_max, Products::kRows, most);
  mask<Products>(last, task.first_key, count, work.scores, most);
  const auto weigh_by = [&](auto products) {
    weigh<decltype(products)>(p.scale, 0, count, work.scores, most, work.row_max, work.row_sum, work.weights, nullptr,
                              fetch);
  };
#if defined(__AVX512BF16__)
  weigh_by(Products());
#else
  p.dtype == kBFloat16 ? weigh_by(CoarseFloats<kFewVecs>()) : weigh_by(Products());
#endif
  const int64_t first = ((task.b * p.kv_heads + task.kv_head) * p.part_count() + task.part) * p.rows();
  float* out = p.parts + first * p.head_dim;
  const auto value = [&](int key, int64_t d) {
    return part_of(value_rows.rows[key], d, p.head_dim, value_rows.scales[key]);
  };
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

}  // namespace afnext

#endif
