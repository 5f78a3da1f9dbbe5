// Products of many rows in int8 or bfloat16, on the matrix unit (AMX) or by dot products of vectors (AVX512-VNNI and -BF16).
//
// A step is 64 bytes of the inputs: 64 of int8, 32 of bfloat16. A stretch of kSteps steps of 32 outputs' weights, a panel,
// is made in the first-level cache, and all tokens go past it, 32 at a time, from the second-level cache, where the same
// stretch of kTokens tokens serves up to kPanels panels. The sums between one stretch and the next wait there, too.
//
// A unit multiplies 32 outputs by 32 tokens. `arrange` lays out a step of 16 outputs' weights or of 16 tokens, each 16 rows
// of 64 bytes.

#pragma once

#include "linear.h"
#include "matrix_unit.h"

#if defined(__AVX512BF16__)

namespace afnext {

constexpr int64_t kTokens = 512;  // a multiple of 32

#if defined(__AMX_INT8__)

// A tile is 16 rows of 64 bytes. The left operand is 16 outputs' weights as they lie, the right one 16 tokens with the four
// bytes that follow each other in a token side by side. One step loads 4 KB for 64 cycles of multiplication, and the
// second-level cache gives half of that in this time: hence panels in the first-level cache. Tokens are loaded with the
// hint to pass it by, as they would drive the panel out of it.
template <bool INT8>
struct Unit {
  static constexpr int64_t kSteps = 16, kPanels = 16, kPanelBytes = kSteps * 2048;
  using Configuration = TileConfiguration;

  static void arrange_weights(uint8_t*) {}
  static void arrange_tokens(const uint8_t* rows, uint8_t* out, int32_t*) { transpose_tile((const uint32_t*)rows, (uint32_t*)out); }

  // sums[i][j]: 16 outputs by 16 tokens of int32 or float32, of outputs 16 i .. of the panel and the tokens of tiles[j], to
  // which `count` steps are added, or with which they begin if `fresh`. The two integers: see for_panels.
  static void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t*, int64_t, int64_t, int64_t count,
                       bool fresh, int32_t* to) {
    auto* sums = (int32_t(*)[2][256])to;
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

  // out[token][output] of 32 tokens and 32 outputs.
  static void unfold(const int32_t* sums, int32_t* out) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const auto* tile = (const uint32_t*)sums + (i * 2 + j) * 256;
        transpose_16([tile](int row) { return tile + row * 16; }, (uint32_t*)out + j * 16 * 32 + i * 16, 32);
      }
  }
};

#else

// Outputs are the lanes, with the four bytes that follow each other in an output's weights in one lane; the four bytes of a
// token are broadcast. Bytes are multiplied with one side unsigned: weights with 128 added, for which 128 times the sum of
// the token's bytes is subtracted.
template <bool INT8>
struct Unit {
  static constexpr int64_t kSteps = 8, kPanels = 8, kPanelBytes = kSteps * 2048;
  struct Configuration {
    Configuration() {}
  };

  static void arrange_weights(uint8_t* tile) {
    if (INT8)
      for (int i = 0; i < 16; ++i) {
        uint8_t* row = tile + i * 64;
        _mm512_storeu_si512(row, _mm512_xor_si512(_mm512_loadu_si512(row), _mm512_set1_epi8((char)0x80)));
      }
    transpose_tile((const uint32_t*)tile, (uint32_t*)tile);
  }

  // begin: of each token, minus 128 times the sum of its bytes.
  static void arrange_tokens(const uint8_t* rows, uint8_t* out, int32_t* begin) {
    std::memcpy(out, rows, 1024);
    if (INT8)
      for (int i = 0; i < 16; ++i) {
        const __m512i total = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), _mm512_loadu_si512(rows + i * 64));
        begin[i] -= _mm512_reduce_add_epi32(total);
      }
  }

  // sums: [32 tokens][32 outputs].
  static void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t* begin, int64_t, int64_t,
                       int64_t count, bool fresh, int32_t* sums) {
    for (int token = 0; token < 32; token += kRows)
      multiply_rows(panel, tiles[token / 16] + token % 16 * 64, begin + token, count, fresh, sums + token * 32);
  }

  static void unfold(const int32_t* sums, int32_t* out) { std::memcpy(out, sums, 32 * 32 * sizeof(int32_t)); }

 private:
  static constexpr int kRows = 8;  // twice as many sums hide the latency of one, and leave registers for operands

  static void multiply_rows(const uint8_t* panel, const uint8_t* tokens, const int32_t* begin, int64_t count, bool fresh,
                            int32_t* sums) {
    __m512i total[kRows][2];
    for (int i = 0; i < kRows; ++i)
      for (int w = 0; w < 2; ++w) {
        total[i][w] = !fresh ? _mm512_loadu_si512(sums + i * 32 + w * 16)
                      : INT8 ? _mm512_set1_epi32(begin[i]) : _mm512_setzero_si512();
      }
    for (int64_t step = 0; step < count; ++step, panel += 2048, tokens += 1024)
      for (int part = 0; part < 64; part += 4) {
        const __m512i by[2] = {_mm512_loadu_si512(panel + part * 16), _mm512_loadu_si512(panel + 1024 + part * 16)};
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          int32_t four;
          std::memcpy(&four, tokens + i * 64 + part, sizeof four);
          const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 2
          for (int w = 0; w < 2; ++w) total[i][w] = add(total[i][w], by[w], all);
        }
      }
    for (int i = 0; i < kRows; ++i)
      for (int w = 0; w < 2; ++w) _mm512_storeu_si512(sums + i * 32 + w * 16, total[i][w]);
  }

  static __m512i add(__m512i total, __m512i weights, __m512i token) {
    if constexpr (INT8) return _mm512_dpbusd_epi32(total, weights, token);
    return (__m512i)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)token);
  }
};

#endif

#if defined(__AMX_INT8__)
constexpr int64_t kFewRows = 4;
#else
constexpr int64_t kFewRows = 16;
#endif

// Whether a product is done here: `products.in_panels` in Python says the same.
inline bool takes_panels(int64_t rows, int64_t columns) { return rows > kFewRows && columns >= 32; }

// Tokens, 16 at a time, as a unit arranges them. Zeros behind the last token and byte.
template <typename Unit>
class PackedTokens {
 public:
  PackedTokens(const void* x, int64_t rows, int64_t bytes, int64_t threads)
      : steps((bytes + 63) / 64),
        stretches((steps + Unit::kSteps - 1) / Unit::kSteps),
        stretch((steps + stretches - 1) / stretches),
        blocks((rows + 31) / 32 * 2),
        tiles_(kept_memory<PackedTokens>(blocks * stretches * stretch * 1024 + blocks * 64)) {
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
      std::memset(begin(block), 0, 64);
      for (int64_t step = 0; step < steps; ++step) {
        alignas(64) uint8_t part[16][64] = {};
        const int64_t width = std::min<int64_t>(64, bytes - step * 64);
        for (int64_t i = 0; i < 16 && block * 16 + i < rows; ++i)
          std::memcpy(part[i], (const uint8_t*)x + (block * 16 + i) * bytes + step * 64, width);
        Unit::arrange_tokens(part[0], tile(block, step), begin(block));
      }
    }
  }

  // The tiles of one stretch of a block follow each other, then come those of the next block.
  uint8_t* tile(int64_t block, int64_t step) const {
    return tiles_ + ((step / stretch * blocks + block) * stretch + step % stretch) * 1024;
  }

  // What the sums of a block's 16 tokens begin with.
  int32_t* begin(int64_t block) const {
    return (int32_t*)(tiles_ + blocks * stretches * stretch * 1024) + block * 16;
  }

  const int64_t steps, stretches, stretch, blocks;

 private:
  uint8_t* tiles_;
};

// Hands the sums of 32 outputs from n on and of 32 tokens to put(row, n, count, sums), a row's 16 outputs at a time,
// leaving out the first `skip` outputs and what is past the last of `rows`.
template <typename Unit, typename Sums, typename Put>
inline void put_sums(const int32_t* sums, int64_t n, int64_t skip, int64_t first_row, int64_t rows, Put put) {
  alignas(64) int32_t unfolded[32 * 32];
  Unit::unfold(sums, unfolded);
  const int64_t count = std::min<int64_t>(32, rows - first_row);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = skip / 16; i < 2; ++i) {
      const int64_t start = std::max<int64_t>(0, skip - i * 16);
      Sums part{};
      if (start == 0) {
        std::memcpy(&part, unfolded + k * 32 + i * 16, sizeof part);
        put(first_row + k, n + i * 16, 16, part);
      } else {
        std::memcpy(&part, unfolded + k * 32 + i * 16 + start, (16 - start) * sizeof(int32_t));
        put(first_row + k, n + i * 16 + start, (int)(16 - start), part);
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
// where the one before it ends. unit.multiply also gets the number of the first token and that of the first step.
template <typename Sums, typename Unit, typename Weights, typename Put>
void for_panels(const Unit& unit, const void* tokens, int64_t rows, int64_t bytes, int64_t columns, int64_t threads,
                Rows source, Weights weights, const void* out, int64_t size, Put put) {
  const PackedTokens<Unit> x(tokens, rows, bytes, threads);
  const Rows results{out, columns * size, 0};
  const int64_t passes = (x.blocks + kTokens / 16 - 1) / (kTokens / 16);
  const int64_t pass = ((x.blocks + passes - 1) / passes + 1) / 2 * 2;  // blocks of tokens
  const int64_t blocks = (columns + 31) / 32;
  const int64_t panels = std::max<int64_t>(1, std::min(Unit::kPanels, blocks / (4 * threads)));
  const int64_t groups = (blocks + panels - 1) / panels;
  const auto output = [&](int64_t block) { return std::min(block * 32, columns - 32); };
  for (int64_t first = 0; first < x.blocks; first += pass) {
    const int64_t end = std::min(first + pass, x.blocks), pairs = (end - first) / 2;
#pragma omp parallel num_threads(threads)
    {
      const typename Unit::Configuration configured;
      const Scratch<uint8_t> panel(Unit::kPanelBytes);
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
            int32_t* sums = waiting + (block - from) * pairs * 1024;
            weights(n, step, count, (uint8_t*)panel);
            for (int64_t tile = 0; tile < 2 * count; ++tile) Unit::arrange_weights(panel + tile * 1024);
            for (int64_t pair = 0; pair < pairs; ++pair, sums += 1024) {
              const int64_t token = first + 2 * pair;
              if (more)
                source.fetch(next + 32 * pair / pairs, next + 32 * (pair + 1) / pairs, next_step,
                             std::min(x.stretch, x.steps - next_step));
              if (last) results.fetch_to_write(token * 16, std::min(token * 16 + 32, rows), n * size);
              const uint8_t* tiles[2] = {x.tile(token, step), x.tile(token + 1, step)};
              unit.multiply(panel, tiles, x.begin(token), token * 16, step, count, stretch == 0, sums);
              if (last) put_sums<Unit, Sums>(sums, n, skip, token * 16, rows, put);
            }
          }
        }
      }
    }
  }
}

// The same for tokens of `inner` int8 or bfloat16 and a unit that needs to know no more.
template <bool INT8, typename Weights, typename Put>
void for_panels(const void* tokens, int64_t rows, int64_t inner, int64_t columns, int64_t threads, Rows source,
                Weights weights, const void* out, int64_t size, Put put) {
  for_panels<std::conditional_t<INT8, IntVec, Vec>>(Unit<INT8>(), tokens, rows, inner * (INT8 ? 1 : 2), columns, threads,
                                                    source, weights, out, size, put);
}

// 32 neighbours in bfloat16, from the first 16 and the last.
inline void store_halves(void* p, Vec first, Vec last) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first));
}

}  // namespace afnext

#endif
