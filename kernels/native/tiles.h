// Products of many rows on the matrix unit (AMX), in int8 or bfloat16.
//
// A tile is 16 rows of 64 bytes. The left operand is 16 outputs' weights, as they lie in memory; the right one 16 tokens,
// with the four bytes (two bfloat16) that follow each other in a token side by side, for which tokens are packed once.
// A product is 32 outputs by 32 tokens at a time, two tiles each way, and kTokens tokens share the weights while these
// are in the second-level cache.

#pragma once

#include "linear.h"
#include "matrix_unit.h"

#if defined(__AMX_INT8__)

namespace afnext {

constexpr int64_t kTokens = 512;  // a multiple of 32

// Whether a product is done here: `products.on_tiles` in Python says the same.
inline bool takes_tiles(int64_t rows, int64_t columns) { return rows > 4 && columns >= 32; }

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
        transpose_tile((const uint32_t*)part, (uint32_t*)tile(block, step));
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
              transpose_tile((const uint32_t*)sums[i][j], (uint32_t*)turned);
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

// 32 neighbours in bfloat16, from the first 16 and the last.
inline void store_halves(void* p, Vec first, Vec last) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first));
}

}  // namespace afnext

#endif
