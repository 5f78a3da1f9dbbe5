// The two matrix products of attention, for each way in which a level multiplies.
//
// A tile has kRows rows (one query of one head each), which are the lanes of W vectors: what belongs to a row
// is in one lane everywhere, so nothing is ever added up across lanes. Transposed, the products are
//   scores[key][row] = sum_d keys[key][d] * queries[d][row],      sums[d][row] += sum_key values[key][d] * weights[key][row]
// in which keys and values are broadcast one by one (Floats), in pairs (Pairs: dot products of bfloat16), or are the left
// operand of a matrix unit (Tiles).
// Keys and values come in chunks of kChunk, rows of `depth` elements (a multiple of kChunk, zeros behind the head's).

#pragma once

#include "elementwise.h"
#include "exponential.h"
#include "matrix_unit.h"

namespace afnext {

constexpr int kChunk = 32;   // keys, and channels, that are handled at a time
constexpr int kBlock = 256;  // keys of a block: their scores for one tile stay in the first-level cache
constexpr int kWide = kLanes == 8 ? 3 : 2;  // vectors of rows in a tile: with kStep, as many sums as there are registers for

// Rows of memory that are read soon, fetched a few lines at a time among the computations, whose pace memory then follows.
class Fetch {
 public:
  explicit Fetch(int64_t bytes) : bytes_(bytes) {}

  // Rows past kMost are left to be read when their time comes.
  void add(const char* row) {
    if (count_ < kMost) rows_[count_++] = row;
  }

  void operator()(int lines) {
    for (; lines && row_ < count_; --lines) {
      __builtin_prefetch(rows_[row_] + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) {
        at_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr int kMost = 256;
  const char* rows_[kMost];
  int count_ = 0, row_ = 0;
  int64_t at_ = 0, bytes_;
};

// out[j][i] = rows[i][j] for 32-bit elements; out has `width` elements a row.
template <int width>
inline void transpose(const uint32_t* const* rows, int columns, uint32_t* out) {
#if defined(__AVX512F__)
  if constexpr (width % 16 == 0) {
    for (int first = 0; first < width; first += 16) {
      for (int column = 0; column < columns; column += 16) {
        transpose_16([=](int i) { return rows[first + i] + column; }, out + (int64_t)column * width + first, width);
      }
    }
    return;
  }
#endif
  for (int column = 0; column < columns; ++column)
    for (int i = 0; i < width; ++i) out[(int64_t)column * width + i] = rows[i][column];
}

// most: raised to the largest of each row's `count` scores.
template <int kRows>
inline void raise_to_largest(const float* scores, int count, float* most) {
  for (int w = 0; w < kRows; w += kLanes) {
    Vec largest[4];
    for (Vec& one : largest) one = load(most + w);
    for (int key = 0; key < count; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec score = load(scores + (key + i) * kRows + w);
        largest[i] = score > largest[i] ? score : largest[i];
      }
    for (int i = 1; i < 4; ++i) largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
    store(most + w, largest[0]);
  }
}

// Scores as they are stored, and the largest of each row.
template <int kRows>
class Scores {
 public:
  Scores(float* scores, float* most) : scores_(scores), most_(most) {
    for (int w = 0; w < kRows / kLanes; ++w) largest_[w] = load(most + w * kLanes);
  }

  ~Scores() {
    for (int w = 0; w < kRows / kLanes; ++w) store(most_ + w * kLanes, largest_[w]);
  }

  void put(int key, int w, Vec score) {
    store(scores_ + key * kRows + w * kLanes, score);
    largest_[w] = score > largest_[w] ? score : largest_[w];
  }

 private:
  float *scores_, *most_;
  Vec largest_[kRows / kLanes];
};

// Everything in float32: any level and any dtype. COARSE: for results that are rounded to bfloat16, with shorter exponentials
// and longer sums.
template <int W, bool COARSE>
struct FloatProducts {
  using Element = float;
  static constexpr int kRows = W * kLanes;
  static constexpr int kStep = kLanes >= 16 || W == 1 ? 8 : 4;  // broadcast at a time, so that no sum waits for another

  static Vec weight(Vec score, Vec most, float scale) {
    const Vec x = (score - most) * scale;
    return COARSE ? exp2_coarse(x) : exp2(x);
  }

  static void put_queries(const float* const* rows, int depth, float* queries) {
    transpose<kRows>((const uint32_t* const*)rows, depth, (uint32_t*)queries);
  }

  // keys[key / kStep][d][kStep]
  static void put_keys(const float* const* rows, int chunk, int depth, float* keys, Fetch& fetch) {
    fetch(128);
    for (int key = 0; key < kChunk; key += kStep) {
      float* to = keys + (int64_t)(chunk * kChunk + key) * depth;
#if defined(__AVX2__)
      if constexpr (kStep == 8) {
        for (int d = 0; d < depth; d += 8) {
          __m256 block[8];
          for (int i = 0; i < 8; ++i) block[i] = _mm256_loadu_ps(rows[key + i] + d);
          transpose_8(block, (uint32_t*)to + d * kStep, kStep);
        }
        continue;
      }
#endif
      for (int d = 0; d < depth; ++d)
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) to[d * kStep + i] = rows[key + i][d];
    }
  }

  // values[key / kChunk][d / kStep][kChunk][kStep]
  static void put_values(const float* const* rows, int chunk, int depth, float* values, Fetch& fetch) {
    fetch(128);
    float* to = values + (int64_t)chunk * kChunk * depth;
    for (int key = 0; key < kChunk; ++key)
      for (int d = 0; d < depth; d += kStep)
        std::memcpy(to + d * kChunk + key * kStep, rows[key] + d, kStep * sizeof(float));
  }

  static void score(const float* queries, const float* keys, int count, int depth, float* scores, float* most, Fetch&) {
    Scores<kRows> to(scores, most);
    for (int key = 0; key < count; key += kStep)
      product(keys + (int64_t)key * depth, 0, queries, 1, depth, [&](int i, int w, Vec sum) { to.put(key + i, w, sum); });
  }

  static void put_weights(int key, int w, Vec even, Vec odd, float* weights) {
    store(weights + key * kRows + w * kLanes, even);
    store(weights + (key + 1) * kRows + w * kLanes, odd);
  }

  static void accumulate(const float* values, const float* weights, int count, int depth, float* sums, Fetch&) {
    // Each chunk of keys by itself, then together: a long sum is not rounded at each of its terms.
    const int run = COARSE ? count : kChunk;
    for (int d = 0; d < depth; d += kStep)
      for (int key = 0; key < count; key += run) {
        const auto put = [&](int i, int w, Vec total) {
          float* at = sums + (d + i) * kRows + w * kLanes;
          store(at, load(at) + total);
        };
        product(values + (int64_t)key * depth + d * kChunk, kChunk * depth, weights + key * kRows, run / kChunk, kChunk, put);
      }
  }

 private:
  // put(i, w, sum) for kStep rows of the left operand, of which each part, [count][kStep], is `pitch` after the one before,
  // and the right one, [parts * count][kRows].
  template <typename Put>
  static void product(const float* left, int64_t pitch, const float* right, int parts, int count, Put put) {
    Vec total[kStep][W] = {};
    for (int part = 0; part < parts; ++part, left += pitch, right += count * kRows)
      for (int j = 0; j < count; ++j) {
        Vec by[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) by[w] = load(right + j * kRows + w * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) {
          const float number = left[j * kStep + i];
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) total[i][w] = kept(total[i][w] + by[w] * number);
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) put(i, w, total[i][w]);
  }
};

template <int W>
using Floats = FloatProducts<W, false>;
template <int W>
using CoarseFloats = FloatProducts<W, true>;

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
  // Each four lanes now hold partial sums of the vectors i, i + 8, i + 4, i + 12.
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 2], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 2], 0xdd));
  const __m512 last = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
  const __m512i order = _mm512_set_epi32(15, 7, 11, 3, 13, 5, 9, 1, 14, 6, 10, 2, 12, 4, 8, 0);
  const __m512 all = _mm512_permutexvar_ps(order, last);
  _mm512_storeu_ps(scores, _mm512_maskz_mov_ps(0x00ff, all));
  _mm512_storeu_ps(scores + kLanes, _mm512_maskz_compress_ps(0xff00, all));
}

#endif

#if defined(__AVX512BF16__)

// What the two ways to multiply bfloat16 share: right operands, in which neighbours of the dimension summed over lie in
// one 32-bit lane.
template <int W>
struct BFloat16Rows {
  using Element = bfloat16;
  static constexpr int kRows = W * kLanes;

  // One rounding of most * scale, the same for all keys, is all that sets it apart from (score - most) * scale.
  static Vec weight(Vec score, Vec most, float scale) {
    const Vec shift = most * scale, least = splat(-3e38f);
    return exp2_coarse(score * scale - (shift > least ? shift : least));
  }

  static void put_queries(const bfloat16* const* rows, int depth, bfloat16* queries) {
    transpose<kRows>((const uint32_t* const*)rows, depth / 2, (uint32_t*)queries);
  }

  static void put_weights(int key, int w, Vec even, Vec odd, bfloat16* weights) {
    store_pairs(weights + key * kRows + 2 * w * kLanes, even, odd);
  }

  // Sixteen channels of two keys side by side.
  static __m512i side_by_side(const bfloat16* even, const bfloat16* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};

// Dot products of bfloat16 pairs with float32 sums.
template <int W>
struct Pairs : BFloat16Rows<W> {
  using BFloat16Rows<W>::kRows;
  static constexpr int kStep = 8;  // broadcast at a time: so many sums need not wait for each other

  static void put_keys(const bfloat16* const* rows, int chunk, int depth, bfloat16* keys, Fetch& fetch) {
    fetch(64);
    for (int i = 0; i < kChunk; ++i)
      for (int d = 0; d < depth; d += 32)
        _mm512_storeu_si512(keys + (int64_t)(chunk * kChunk + i) * depth + d, _mm512_loadu_si512(rows[i] + d));
  }

  // values[key / 2][d]: pairs of keys side by side.
  static void put_values(const bfloat16* const* rows, int chunk, int depth, bfloat16* values, Fetch& fetch) {
    fetch(64);
    for (int i = 0; i < kChunk; i += 2) {
      bfloat16* to = values + (int64_t)(chunk * kChunk + i) * depth;
      for (int d = 0; d < depth; d += 16)
        _mm512_storeu_si512(to + 2 * d, Pairs::side_by_side(rows[i] + d, rows[i + 1] + d));
    }
  }

  static void score(const bfloat16* queries, const bfloat16* keys, int count, int depth, float* scores, float* most, Fetch&) {
    Scores<kRows> to(scores, most);
    for (int key = 0; key < count; key += kStep)
      product(keys + (int64_t)key * depth, depth, 2, queries, depth / 2,
              [&](int i, int w, __m512 total) { to.put(key + i, w, (Vec)total); });
  }

  static void accumulate(const bfloat16* values, const bfloat16* weights, int count, int depth, float* sums, Fetch&) {
    for (int d = 0; d < depth; d += kStep) {
      product(values + 2 * d, 2, 2 * depth, weights, count / 2, [&](int i, int w, __m512 total) {
        float* at = sums + (d + i) * kRows + w * kLanes;
        store(at, load(at) + (Vec)total);
      });
    }
  }

 private:
  // put(i, w, sum) for kStep rows of the left operand: over `count` pairs, of which pair j of row i is at
  // left + i * across + j * along, and of the right operand at right + j * 2 * kRows.
  template <typename Put>
  static void product(const bfloat16* left, int across, int along, const bfloat16* right, int count, Put put) {
    __m512 total[kStep][W];
    for (auto& row : total)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int j = 0; j < count; ++j) {
      __m512bh by[W];
      for (int w = 0; w < W; ++w) by[w] = (__m512bh)_mm512_loadu_si512(right + j * 2 * kRows + 2 * w * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        int32_t pair;
        std::memcpy(&pair, left + i * across + j * along, sizeof pair);
        const __m512bh all = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) total[i][w] = _mm512_dpbf16_ps(total[i][w], all, by[w]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) put(i, w, total[i][w]);
  }
};

// The first product for R rows and two keys, with channels as the lanes: scores[k * kLanes + r], the lanes behind R zero.
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
    __m512 low[R], high[R];  // of each eight channels the first four, and the last
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int key = 0; key < count; key += 2) {
      fetch(2);
      const __m512i even = value(key, d), odd = value(key + 1, d);
      const __m512bh pairs[2] = {(__m512bh)_mm512_unpacklo_epi16(even, odd), (__m512bh)_mm512_unpackhi_epi16(even, odd)};
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

#elif defined(__AVX2__)

#if !defined(__AVX512F__)
// The sums of the lanes of eight vectors.
inline Vec sums_of_lanes(const Vec (&x)[8]) {
  const auto pair = [&](int i) { return _mm256_hadd_ps((__m256)x[i], (__m256)x[i + 1]); };
  const __m256 first = _mm256_hadd_ps(pair(0), pair(2)), last = _mm256_hadd_ps(pair(4), pair(6));
  return (Vec)_mm256_permute2f128_ps(first, last, 0x20) + (Vec)_mm256_permute2f128_ps(first, last, 0x31);
}
#endif

constexpr int kTogether = kLanes == 16 ? 2 : 1;  // of two keys, or halves, at once: as many sums as there are registers for

// The first product for R rows and two keys, with channels as the lanes: scores[k * kLanes + r], the lanes behind R zero.
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
  for (int k = 0; k < 2; ++k) store(scores + k * kLanes, sums_of_lanes(total[k]));
#endif
}

// The second product for R rows, with channels as the lanes: sum_key weights[key][r] * value(key, d) goes to put(r, d, sums).
// weights: of Floats<1>; value(key, d): the channels d .. d + 2 * kLanes - 1, in an order that put knows.
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
          const Vec by = splat(weights[key * kLanes + r]);
          for (int half = first; half < first + kTogether; ++half) total[half][r] += halves[half] * by;
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) put(r, d, TwoVecs{total[0][r], total[1][r]});
  }
}

#endif

#if defined(__AMX_BF16__)

// The matrix unit: 16 x 32 times 32 x 16 at once, in bfloat16 with float32 sums. Both left operands are laid out in
// tiles of one kilobyte.
template <int W>
struct Tiles : BFloat16Rows<W> {
  using BFloat16Rows<W>::kRows;
  static constexpr int kPitch = kRows * 4;  // bytes from one row of a right operand or a result to the next

  // keys[d / 32][key][32]
  static void put_keys(const bfloat16* const* rows, int chunk, int depth, bfloat16* keys, Fetch& fetch) {
    for (int d = 0; d < depth; d += kChunk) {
      fetch(8);
      bfloat16* to = keys + (int64_t)d * kBlock + chunk * kChunk * kChunk;
      for (int i = 0; i < kChunk; ++i) _mm512_storeu_si512(to + i * kChunk, _mm512_loadu_si512(rows[i] + d));
    }
  }

  // values[key / 32][d][32]: pairs of keys side by side, then 16 of these pairs for each channel.
  static void put_values(const bfloat16* const* rows, int chunk, int depth, bfloat16* values, Fetch& fetch) {
    uint32_t* to = (uint32_t*)(values + (int64_t)chunk * kChunk * depth);
    for (int d = 0; d < depth; d += 16) {
      fetch(14);
      uint32_t pairs[16][16];
      for (int i = 0; i < 16; ++i)
        _mm512_storeu_si512(pairs[i], Tiles::side_by_side(rows[2 * i] + d, rows[2 * i + 1] + d));
      transpose_tile(pairs[0], to + d * 16);
    }
  }

  static void score(const bfloat16* queries, const bfloat16* keys, int count, int depth, float* scores, float* most,
                    Fetch& fetch) {
    for (int key = 0; key < count; key += kChunk) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < depth; d += kChunk) {
        fetch(8);
        const bfloat16* left = keys + (int64_t)d * kBlock + key * kChunk;
        add_product(left, queries + d * kRows);
      }
      store_sums(scores + key * kRows);
    }
    raise_to_largest<kRows>(scores, count, most);
  }

  static void accumulate(const bfloat16* values, const bfloat16* weights, int count, int depth, float* sums, Fetch& fetch) {
    for (int d = 0; d < depth; d += kChunk) {
      float* to = sums + d * kRows;
      _tile_loadd(0, to, kPitch);
      _tile_loadd(1, to + 16 * kRows, kPitch);
      if constexpr (W == 2) {
        _tile_loadd(2, to + 16, kPitch);
        _tile_loadd(3, to + 16 * kRows + 16, kPitch);
      }
      for (int key = 0; key < count; key += kChunk) {
        fetch(8);
        const bfloat16* left = values + (int64_t)key * depth + d * kChunk;
        add_product(left, weights + key * kRows);
      }
      store_sums(to);
    }
  }

 private:
  // Adds to the tiles 0 .. 3 the product of two left tiles and W right ones.
  static void add_product(const bfloat16* left, const bfloat16* right) {
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + 16 * kChunk, 64);
    _tile_loadd(6, right, kPitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (W == 2) {
      _tile_loadd(7, right + 32, kPitch);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  static void store_sums(float* to) {
    _tile_stored(0, to, kPitch);
    _tile_stored(1, to + 16 * kRows, kPitch);
    if constexpr (W == 2) {
      _tile_stored(2, to + 16, kPitch);
      _tile_stored(3, to + 16 * kRows + 16, kPitch);
    }
  }
};

#endif

}  // namespace afnext
