// Products of many rows on the matrix unit (AMX), in int8 or bfloat16.
//
// A tile is 16 rows of 64 bytes. The left operand is 16 outputs' weights, as they lie in memory; the right one 16 tokens,
// with the four bytes (two bfloat16) that follow each other in a token side by side, for which tokens are packed once.
// A product is 32 outputs by 32 tokens at a time, two tiles each way, and kTokens tokens share the weights while these
// are in the second-level cache.

#pragma once

#include "linear.h"

#if defined(__AMX_INT8__)

namespace afnext {

constexpr int64_t kTokens = 512;  // a multiple of 32

// Whether a product is done here: `products.on_tiles` in Python says the same.
inline bool takes_tiles(int64_t rows, int64_t columns) { return rows > 4 && columns >= 32; }

// Gives the calling thread the eight tiles, 16 rows of 64 bytes each, and puts back what was configured before.
class TileConfiguration {
 public:
  TileConfiguration() {
    _tile_storeconfig(&before_);
    Layout tiles{};
    tiles.palette = 1;
    for (int i = 0; i < 8; ++i) {
      tiles.row_bytes[i] = 64;
      tiles.rows[i] = 16;
    }
    _tile_loadconfig(&tiles);
  }
  ~TileConfiguration() {
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Layout before_;
};

// out[j][i] = rows[i][j] of 16 x 16 elements of 32 bits; rows `pitch` apart.
inline void transpose_tile(const uint32_t* rows, int64_t pitch, uint32_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * pitch);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

// Tokens as right operands: of each 16 tokens, for each 64 bytes, one tile. Zeros behind the last token and byte.
class PackedTokens {
 public:
  PackedTokens(const void* x, int64_t rows, int64_t bytes, int64_t threads)
      : steps((bytes + 63) / 64), blocks((rows + 31) / 32 * 2), tiles_(blocks * steps * 1024) {
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t step = 0; step < steps; ++step) {
        alignas(64) uint8_t part[16][64] = {};
        const int64_t width = std::min<int64_t>(64, bytes - step * 64);
        for (int64_t i = 0; i < 16 && block * 16 + i < rows; ++i)
          std::memcpy(part[i], (const uint8_t*)x + (block * 16 + i) * bytes + step * 64, width);
        transpose_tile((const uint32_t*)part, 16, (uint32_t*)tile(block, step));
      }
  }

  uint8_t* tile(int64_t block, int64_t step) const { return tiles_ + (block * steps + step) * 1024; }

  const int64_t steps, blocks;

 private:
  Scratch<uint8_t> tiles_;
};

// sums[i][j]: 16 outputs by 16 tokens of int32 or float32, of outputs 16 i .. and tokens 16 (block + j) ..
// weights: 32 rows `pitch` bytes apart, of which the last step is not whole if `tail` is given: 32 rows of 64 bytes.
template <bool INT8>
inline void tile_product(const uint8_t* weights, int64_t pitch, const uint8_t* tail, const PackedTokens& x, int64_t block,
                         int32_t (*sums)[2][256]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < x.steps; ++step) {
    const bool last = tail && step + 1 == x.steps;
    const uint8_t* left = last ? tail : weights + step * 64;
    const int64_t apart = last ? 64 : pitch;
    _tile_loadd(4, left, apart);
    _tile_loadd(5, left + 16 * apart, apart);
    _tile_loadd(6, x.tile(block, step), 64);
    _tile_loadd(7, x.tile(block + 1, step), 64);
    if constexpr (INT8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
}

// Weights of 32 outputs as left operands: rows of bytes `pitch` apart, and the last, partial 64 bytes of each row with
// zeros behind them, or null.
struct LeftOperand {
  const uint8_t* rows;
  int64_t pitch;
  const uint8_t* tail;
};

// The product of all tokens with `columns` (>= 32) outputs. weights(n, scratch) gives the LeftOperand of outputs n .. n + 31,
// made in `scratch` bytes if it likes; put(row, n, count, sums) takes sums of `count` outputs of a row, int32 or float32.
// The last block of outputs begins so early that it is whole, and is put where the one before it ends.
template <bool INT8, typename Weights, typename Put>
void for_tile_blocks(const PackedTokens& x, int64_t rows, int64_t columns, int64_t scratch, int64_t threads,
                     Weights weights, Put put) {
  using Sums = std::conditional_t<INT8, IntVec, Vec>;
  for (int64_t first = 0; first < x.blocks; first += kTokens / 16) {
    const int64_t end = std::min(first + kTokens / 16, x.blocks);
#pragma omp parallel num_threads(threads)
    {
      const TileConfiguration configured;
      const Scratch<uint8_t> own(scratch);
      alignas(64) int32_t sums[2][2][256];
      alignas(64) int32_t turned[256];
#pragma omp for schedule(dynamic, 4)
      for (int64_t block = 0; block < (columns + 31) / 32; ++block) {
        const int64_t n = std::min(block * 32, columns - 32), skip = block * 32 - n;
        const LeftOperand left = weights(n, (uint8_t*)own);
        for (int64_t token = first; token < end; token += 2) {
          tile_product<INT8>(left.rows, left.pitch, left.tail, x, token, sums);
          for (int64_t i = skip / 16; i < 2; ++i)
            for (int64_t j = 0; j < 2; ++j) {
              transpose_tile((const uint32_t*)sums[i][j], 16, (uint32_t*)turned);
              const int64_t start = std::max<int64_t>(0, skip - i * 16);
              for (int64_t row = (token + j) * 16; row < std::min((token + j + 1) * 16, rows); ++row) {
                Sums whole{};
                std::memcpy(&whole, turned + row % 16 * 16 + start, (16 - start) * sizeof(int32_t));
                put(row, n + i * 16 + start, (int)(16 - start), whole);
              }
            }
        }
      }
    }
  }
}

// 32 neighbours in bfloat16, from the first 16 and the last, or from the even ones and the odd ones.
inline void store_halves(void* p, Vec first, Vec last) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first));
}

inline void store_pairs(void* p, Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}

}  // namespace afnext

#endif
