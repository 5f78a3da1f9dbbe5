// Products of many rows on the matrix unit (AMX), in int8 or bfloat16.
//
// A tile is 16 rows of 64 bytes. The left operand is 16 outputs' weights, the right one 16 tokens with the four bytes (two
// bfloat16) that follow each other in a token side by side, for which tokens are packed once. A product is 32 outputs by
// 32 tokens at a time, two tiles each way; one such step loads 4 KB for 64 cycles of multiplication, and the
// second-level cache gives half of that in this time. So a stretch of kSteps steps of 32 outputs' weights, a panel, is
// made in the first-level cache, and all tokens go past it, from the second-level cache, where the same stretch of kTokens
// tokens serves up to kPanels panels. The sums between one stretch and the next wait there, too. Tokens are loaded with the
// hint to pass the first-level cache by, as they would drive the panel out of it.

#pragma once

#include "linear.h"
#include "matrix_unit.h"

#if defined(__AMX_INT8__)

namespace afnext {

constexpr int64_t kTokens = 512;  // a multiple of 32
constexpr int64_t kSteps = 16;
constexpr int64_t kPanels = 16;
constexpr int64_t kPanelBytes = kSteps * 32 * 64;

// Whether a product is done here: `products.on_tiles` in Python says the same.
inline bool takes_tiles(int64_t rows, int64_t columns) { return rows > 4 && columns >= 32; }

// Tokens as right operands: of each 16 tokens, for each 64 bytes, one tile. Zeros behind the last token and byte.
class PackedTokens {
 public:
  PackedTokens(const void* x, int64_t rows, int64_t bytes, int64_t threads)
      : steps((bytes + 63) / 64),
        stretches((steps + kSteps - 1) / kSteps),
        stretch((steps + stretches - 1) / stretches),
        blocks((rows + 31) / 32 * 2),
        tiles_(kept_memory<PackedTokens>(blocks * stretches * stretch * 1024)) {
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

  // The tiles of one stretch of a block follow each other, then come those of the next block.
  uint8_t* tile(int64_t block, int64_t step) const {
    return tiles_ + ((step / stretch * blocks + block) * stretch + step % stretch) * 1024;
  }

  const int64_t steps, stretches, stretch, blocks;

 private:
  uint8_t* tiles_;
};

// sums[i][j]: 16 outputs by 16 tokens of int32 or float32, of outputs 16 i .. of the panel and the tokens of tiles[j], to
// which `count` steps are added, or with which they begin if `fresh`.
template <bool INT8>
inline void tile_product(const uint8_t* panel, const uint8_t* const* tiles, int64_t count, bool fresh,
                         int32_t (*sums)[2][256]) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0][0], 64);
    _tile_loadd(1, sums[0][1], 64);
    _tile_loadd(2, sums[1][0], 64);
    _tile_loadd(3, sums[1][1], 64);
  }
  for (int64_t step = 0; step < count; ++step) {
    _tile_loadd(4, panel + step * 2048, 64);
    _tile_stream_loadd(6, tiles[0] + step * 1024, 64);
    _tile_stream_loadd(7, tiles[1] + step * 1024, 64);
    _tile_loadd(5, panel + step * 2048 + 1024, 64);
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

// Hands the sums of 32 outputs from n on and of 32 tokens to put(row, n, count, sums), a row's 16 outputs at a time,
// leaving out the first `skip` outputs and what is past the last of `rows`.
template <typename Sums, typename Put>
inline void put_sums(const int32_t (*sums)[2][256], int64_t n, int64_t skip, int64_t first_row, int64_t rows, Put put) {
  alignas(64) int32_t turned[2][256];
  for (int64_t j = 0; j < 2; ++j) {
    const int64_t row = first_row + j * 16, count = std::min<int64_t>(16, rows - row);
    for (int i = 0; i < 2; ++i) transpose_tile((const uint32_t*)sums[i][j], (uint32_t*)turned[i]);
    const auto part = [&](int64_t i, int64_t k) {
      Sums whole;
      std::memcpy(&whole, turned[i] + k * 16, sizeof whole);
      return whole;
    };
    for (int64_t k = 0; k < count; ++k) {
      if (skip == 0) {
        put(row + k, n, 16, part(0, k));
        put(row + k, n + 16, 16, part(1, k));
        continue;
      }
      for (int64_t i = skip / 16; i < 2; ++i) {
        const int64_t start = std::max<int64_t>(0, skip - i * 16);
        Sums rest{};
        std::memcpy(&rest, turned[i] + k * 16 + start, (16 - start) * sizeof(int32_t));
        put(row + k, n + i * 16 + start, (int)(16 - start), rest);
      }
    }
  }
}

// Rows in memory, to be fetched ahead of their use, since pieces of them at a time are no stream that the CPU notices.
struct Rows {
  const void* data;
  int64_t pitch, step;  // bytes from a row to the next, and from a step to the next within a row

  // `count` steps from `step` on of the rows first .. end - 1, into the second-level cache.
  void fetch(int64_t first, int64_t end, int64_t step_, int64_t count) const {
    for (int64_t row = first; row < end; ++row) {
      const char* from = (const char*)data + row * pitch + step_ * step;
      for (int64_t at = 0; at < count * step; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

  // What lies in these rows at `offset` bytes, to be written.
  void fetch_to_write(int64_t first, int64_t end, int64_t offset) const {
    for (int64_t row = first; row < end; ++row) __builtin_prefetch((const char*)data + row * pitch + offset, 1, 3);
  }
};

struct Waiting;

// The product of all tokens with `columns` (>= 32) outputs. weights(n, step, count, panel) writes the weights of the
// outputs n .. n + 31 for `count` steps: 64 bytes of each output, one output after another, zeros past the last input;
// they are made of `source`. put(row, n, count, sums) takes sums of `count` outputs of a row, int32 or float32, and writes
// to `out`, [rows, columns] of `size` bytes each. The last block of outputs begins so early that it is whole, and is put
// where the one before it ends.
template <bool INT8, typename Weights, typename Put>
void for_tile_blocks(const PackedTokens& x, int64_t rows, int64_t columns, int64_t threads, Rows source, Weights weights,
                     const void* out, int64_t size, Put put) {
  using Sums = std::conditional_t<INT8, IntVec, Vec>;
  const Rows results{out, columns * size, 0};
  const int64_t passes = (x.blocks + kTokens / 16 - 1) / (kTokens / 16);
  const int64_t pass = ((x.blocks + passes - 1) / passes + 1) / 2 * 2;  // blocks of tokens
  const int64_t blocks = (columns + 31) / 32;
  const int64_t panels = std::max<int64_t>(1, std::min(kPanels, blocks / (4 * threads)));
  const int64_t groups = (blocks + panels - 1) / panels;
  const auto output = [&](int64_t block) { return std::min(block * 32, columns - 32); };
  for (int64_t first = 0; first < x.blocks; first += pass) {
    const int64_t end = std::min(first + pass, x.blocks), pairs = (end - first) / 2;
#pragma omp parallel num_threads(threads)
    {
      const TileConfiguration configured;
      const Scratch<uint8_t> panel(kPanelBytes);
      int32_t* const waiting = (int32_t*)kept_memory<Waiting>(panels * pass * 2048);
#pragma omp for schedule(dynamic, 1)
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = group * panels, to = std::min(from + panels, blocks);
        for (int64_t stretch = 0; stretch < x.stretches; ++stretch) {
          const int64_t step = stretch * x.stretch, count = std::min(x.stretch, x.steps - step);
          const bool last = stretch + 1 == x.stretches;
          for (int64_t block = from; block < to; ++block) {
            const int64_t n = output(block), skip = block * 32 - n;
            const bool more = block + 1 < to || !last;
            const int64_t next = output(block + 1 < to ? block + 1 : from), next_step = block + 1 < to ? step : step + count;
            auto* sums = (int32_t(*)[2][256])(waiting + (block - from) * pairs * 1024);
            weights(n, step, count, (uint8_t*)panel);
            for (int64_t pair = 0; pair < pairs; ++pair, sums += 2) {
              const int64_t token = first + 2 * pair;
              if (more)
                source.fetch(next + 32 * pair / pairs, next + 32 * (pair + 1) / pairs, next_step,
                             std::min(x.stretch, x.steps - next_step));
              if (last) results.fetch_to_write(token * 16, std::min(token * 16 + 32, rows), n * size);
              const uint8_t* tiles[2] = {x.tile(token, step), x.tile(token + 1, step)};
              tile_product<INT8>(panel, tiles, count, stretch == 0, sums);
              if (last) put_sums<Sums>(sums, n, skip, token * 16, rows, put);
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
