// The two matrix products of attention, for each kind of multiplication, and the softmax between them.
//
// A tile has kRows rows (one query of one head each), which are the lanes of W vectors: all values of a row are in the
// same lane, so there are no sums across lanes. Transposed, the products are
//   scores[key][row] = sum_d keys[key][d] * queries[d][row],      sums[d][row] += sum_key values[key][d] * weights[key][row]
// in which keys and values are broadcast one by one (Floats), in pairs (Pairs: dot products of bfloat16), or are the left
// operand of AMX (Tiles).
// Keys and values are in chunks of kChunk, in rows of `depth` elements (a multiple of kChunk, padded with zeros).

#pragma once

#include <cmath>

#include "exponential.h"
#include "matrix_unit.h"

namespace afnext {

constexpr int kChunk = 32;   // keys, and channels, at a time
constexpr int kBlock = 256;  // keys of a block: their scores for one tile stay in L1
// Vectors of rows in a tile: with kStep, as many sums as fit in registers.
#if defined(AFNEXT_NEON)
constexpr int kWide = 4;
#else
constexpr int kWide = kLanes == 8 ? 3 : 2;
#endif

// Prefetches rows of memory a few lines at a time between computations, so that reads are spread over the computation.
class Fetch {
 public:
  explicit Fetch(int64_t bytes) : bytes_(bytes) {}

  // Rows past kMost are not prefetched.
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

// out[j][i] = rows[i][j] for 32-bit elements; out has `width` elements a row; columns: a multiple of 4.
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
#elif defined(AFNEXT_NEON)
  for (int first = 0; first < width; first += 4)
    for (int column = 0; column < columns; column += 4)
      transpose_4([=](int i) { return rows[first + i] + column; }, out + (int64_t)column * width + first, width);
  return;
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

// Writes scores, and keeps the largest of each row.
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

// Everything in float32: any level and any dtype. COARSE: for results that are rounded to bfloat16, with less precise
// exponentials and longer sums.
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
#elif defined(AFNEXT_NEON)
      for (int i = 0; i < kStep; i += 4)
        for (int d = 0; d < depth; d += 4)
          transpose_4([=](int row) { return (const uint32_t*)rows[key + i + row] + d; }, (uint32_t*)to + d * kStep + i,
                      kStep);
      continue;
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
      product(keys + (int64_t)key * depth, 0, queries, 1, depth,
              [&](int i, int w, Vec sum) { to.put(key + i, w, sum); });
  }

  static void put_weights(int key, int w, Vec even, Vec odd, float* weights) {
    store(weights + key * kRows + w * kLanes, even);
    store(weights + (key + 1) * kRows + w * kLanes, odd);
  }

  static void accumulate(const float* values, const float* weights, int count, int depth, float* sums, Fetch&) {
    // Sums each chunk of keys separately, then adds the sums, which limits rounding errors.
    const int run = COARSE ? count : kChunk;
    for (int d = 0; d < depth; d += kStep)
      for (int key = 0; key < count; key += run) {
        const auto put = [&](int i, int w, Vec total) {
          float* at = sums + (d + i) * kRows + w * kLanes;
          store(at, load(at) + total);
        };
        product(values + (int64_t)key * depth + d * kChunk, kChunk * depth, weights + key * kRows, run / kChunk, kChunk,
                put);
      }
  }

 private:
  // Calls put(i, w, sum) for kStep rows of the left operand, of which each part, [count][kStep], is `pitch` after the
  // one before, and the right one, [parts * count][kRows].
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

#if defined(__AVX512BF16__)

// Shared by both ways to multiply bfloat16: right operands, in which neighbours along the inner dimension are in one
// 32-bit lane.
template <int W>
struct BFloat16Rows {
  using Element = bfloat16;
  static constexpr int kRows = W * kLanes;

  // Differs from (score - most) * scale only by one rounding of most * scale, which is the same for all keys.
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
  static constexpr int kStep = 8;  // broadcast at a time: enough independent sums to hide latency

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

  static void score(const bfloat16* queries, const bfloat16* keys, int count, int depth, float* scores, float* most,
                    Fetch&) {
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
  // Calls put(i, w, sum) for kStep rows of the left operand: over `count` pairs, of which pair j of row i is at
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

#endif

#if defined(__AMX_BF16__)

// AMX: 16 x 32 times 32 x 16 at once, in bfloat16 with float32 sums. Both left operands are laid out in tiles of one
// kilobyte.
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

  static void accumulate(const bfloat16* values, const bfloat16* weights, int count, int depth, float* sums,
                         Fetch& fetch) {
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
  // Adds the product of two left tiles and W right tiles to the tiles 0 .. 3.
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

// Sets scores of keys past each row's last key to -inf; most: raised to the largest of the others.
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

// Converts the block's scores to weights, as the right operand of the second product, and updates row_max, row_sum and
// sums, of `depth` channels. most: the largest score of each row so far.
template <typename Products>
void weigh(float scale, int64_t depth, int count, const float* scores, const float* most, float* row_max,
           float* row_sum, typename Products::Element* weights, float* sums, Fetch& fetch) {
  constexpr int W = Products::kRows / kLanes;
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

}  // namespace afnext
