// Products of many rows by AMX or by vectors, in int8 or in floats.
//
// A step is 64 bytes of inputs in the unit's element type. A panel is a stretch of kSteps steps of 32 outputs' weights,
// written in L1. All tokens are multiplied with it, two tiles at a time, from L2, where the same stretch of kPass
// tokens serves up to kPanels panels. The sums are in L2, too, between one stretch and the next.

#pragma once

#include "panel_units.h"

#if defined(AFNEXT_PANELS)

namespace afnext {

#if defined(__AMX_INT8__)
constexpr int64_t kFewRows = 4;
#else
constexpr int64_t kFewRows = 16;
#endif

// Whether panels are used for a product, and for activations of T. `products.in_panels` in Python has the same rule.
inline bool takes_panels(int64_t rows, int64_t columns) { return rows > kFewRows && columns >= 32; }
template <typename T>
constexpr bool kPanelsTake = std::is_same_v<T, Number> || std::is_same_v<Number, float>;

template <typename From, typename To>
inline void convert_elements(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy((void*)to, from, count * sizeof(To));
  } else if constexpr (std::is_same_v<To, float>) {
    to_floats(from, to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

#if defined(AFNEXT_MMLA)
// count: a multiple of kLanes.
inline void convert_elements(const int8_t* from, int64_t count, bfloat16* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}
#elif defined(__AVX512BF16__)
// Up to 32 elements, written as a whole step padded with zeros.
inline void convert_elements(const int8_t* from, int64_t count, bfloat16* to) {
  const auto part = [&](int64_t first) {
    return count >= first + kLanes ? load(from + first)
                                   : load_first(from + first, (int)std::max<int64_t>(0, count - first));
  };
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)part(kLanes), (__m512)part(0)));
}
#endif

// The first `count` elements as 64 bytes of To, padded with zeros.
template <typename To, typename From>
inline void copy_step(const From* from, int64_t count, uint8_t* out) {
  constexpr int64_t kInputs = 64 / sizeof(To);
  if (count >= kInputs) return convert_elements(from, kInputs, (To*)out);  // a few instructions, no call and no loop
  std::memset(out, 0, 64);
  convert_elements(from, count, (To*)out);
}

// Tokens [rows, inner] in the unit's layout, a tile at a time, padded with zeros after the last token and input.
template <typename Unit>
class PackedTokens {
 public:
  template <typename X>
  PackedTokens(const X* x, int64_t rows, int64_t inner, int64_t threads)
      : steps((inner + kInputs - 1) / kInputs),
        stretch(even_stretch(steps)),
        stretches((steps + stretch - 1) / stretch),
        blocks((rows + 2 * Unit::kTile - 1) / (2 * Unit::kTile) * 2),
        tiles_(kept_memory<PackedTokens>(blocks * (stretches * stretch * kTileBytes + Unit::kTile * sizeof(int32_t)))) {
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
      const X* first = x + block * Unit::kTile * inner;
      const int64_t count = std::max<int64_t>(0, std::min<int64_t>(Unit::kTile, rows - block * Unit::kTile));
      for (int64_t i = 0; i < Unit::kTile; ++i) begin(block)[i] = i < count ? Unit::begin(first + i * inner, inner) : 0;
      for (int64_t step = 0; step < steps; ++step) {
        uint8_t* to = tile(block, step);
        for (int64_t i = 0; i < count; ++i)
          copy_step<Element>(first + i * inner + step * kInputs, inner - step * kInputs, to + i * 64);
        if (count < Unit::kTile) std::memset(to + count * 64, 0, (Unit::kTile - count) * 64);
        Unit::arrange_tokens(to);
      }
    }
  }

  // The tiles of one stretch of a block are contiguous, followed by those of the next block.
  uint8_t* tile(int64_t block, int64_t step) const {
    return tiles_ + ((step / stretch * blocks + block) * stretch + step % stretch) * kTileBytes;
  }

  // The initial values of the sums of a block's tokens.
  int32_t* begin(int64_t block) const {
    return (int32_t*)(tiles_ + blocks * stretches * stretch * kTileBytes) + block * Unit::kTile;
  }

  const int64_t steps, stretch, stretches, blocks;

 private:
  using Element = typename Unit::Element;
  static constexpr int64_t kInputs = 64 / sizeof(Element), kTileBytes = 64 * Unit::kTile;

  static int64_t even_stretch(int64_t steps) {
    const int64_t stretches = (steps + Unit::kSteps - 1) / Unit::kSteps, even = (steps + stretches - 1) / stretches;
    return (even + Unit::kGranule - 1) / Unit::kGranule * Unit::kGranule;
  }

  uint8_t* tiles_;
};

// Passes the sums of a block of outputs from n on and of two tiles of tokens to put(row, n, count, sums), kLanes
// outputs of a row at a time, without the first `skip` outputs and without rows past the last of `rows`. A separate
// function leaves the registers to the multiplication.
template <typename Unit, typename Sums, int MATRICES, typename Put>
__attribute__((noinline)) void put_sums(const int32_t* sums, int64_t n, int64_t skip, int64_t first_row, int64_t rows,
                                        Put put) {
  alignas(64) int32_t space[2 * Unit::kTile * 32];
  const int32_t* unfolded = Unit::unfold(sums, space);
  const int64_t count = std::min<int64_t>(2 * Unit::kTile, rows - first_row);
  constexpr int64_t kOutputs = 32 / MATRICES;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = skip / kLanes * kLanes; i < kOutputs; i += kLanes) {
      const int64_t start = std::max<int64_t>(0, skip - i);
      const int32_t* from = unfolded + k * 32 + i + start;
      Sums parts[MATRICES] = {};
      if (start == 0) {
        for (int m = 0; m < MATRICES; ++m) parts[m] = load_as<Sums>(from + m * kOutputs);
        put(first_row + k, n + i, kLanes, parts);
      } else {
        for (int m = 0; m < MATRICES; ++m)
          std::memcpy(&parts[m], from + m * kOutputs, (kLanes - start) * sizeof(int32_t));
        put(first_row + k, n + i + start, (int)(kLanes - start), parts);
      }
    }
}

// Rows in memory, prefetched explicitly, because the hardware prefetcher does not recognize reads of pieces of rows.
struct Rows {
  const void* data;
  int64_t pitch, step;  // bytes from a row to the next, and from a step to the next within a row

  // `count` steps from `step` on of the rows first .. end - 1, into L2.
  void fetch(int64_t first, int64_t end, int64_t step_, int64_t count) const {
    for (int64_t row = first; row < end; ++row) {
      const char* from = (const char*)data + row * pitch + step_ * step;
      for (int64_t at = 0; at < count * step; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

  // A cache line at `offset` bytes in each of these rows, to be written.
  void fetch_to_write(int64_t first, int64_t end, int64_t offset) const {
    for (int64_t row = first; row < end; ++row) __builtin_prefetch((const char*)data + row * pitch + offset, 1, 3);
  }
};

struct Waiting;

// The output of a product: [rows, columns] of `size` bytes each, from the sums of one matrix or of two.
struct Outputs {
  void* data;
  int64_t columns, size;
  int matrices;

  template <typename T>
  explicit Outputs(const Epilogue<T>& write)
      : data(write.out), columns(write.columns), size(sizeof(T)), matrices(write.pair ? 2 : 1) {}
};

// The product of all tokens with one matrix of weights of 32 columns or more, or with two of the same shape, which
// share a panel: outputs n .. n + 31 of one matrix, or n .. n + 15 of each. A Matrix has
//   write(n, outputs, step, count, panel, at): writes the weights of `outputs` outputs and `count` steps. For each step,
//     a panel has 64 bytes for each of 32 outputs; these outputs begin at output `at`. Zeros past the last input
//   source(): the memory that `write` reads
// put(row, n, count, sums) writes the sums of `count` outputs of a row, int32 or float32, given as one vector per
// matrix. The last block of outputs begins early enough to be whole; only its outputs past the previous block are put.
// unit.multiply also gets the index of the first token, the number of tokens, and the index of the first step.
template <typename Sums, typename Unit, typename X, typename Matrix, typename Put>
void for_panels(const Unit& unit, const X* tokens, int64_t rows, int64_t inner, int64_t threads, const Matrix* matrices,
                const Outputs& out, Put put) {
  constexpr int64_t kPair = 2 * Unit::kTile, kMostPairs = Unit::kPass / kPair, kSums = kPair * 32;
  const int64_t width = 32 / out.matrices;  // outputs of a block
  const Rows results{out.data, out.columns * out.size, 0};
  const int64_t all_pairs = (rows + kPair - 1) / kPair, passes = (all_pairs + kMostPairs - 1) / kMostPairs;
  const int64_t pass = (all_pairs + passes - 1) / passes * kPair;
  const int64_t blocks = (out.columns + width - 1) / width;
  const int64_t panels = std::max<int64_t>(1, std::min(Unit::kPanels, blocks / (4 * threads)));
  const int64_t groups = (blocks + panels - 1) / panels;
  const auto output = [&](int64_t block) { return std::min(block * width, out.columns - width); };
  use_large_pages(out.data, rows * out.columns * out.size);
  for (int64_t first = 0; first < rows; first += pass) {
    const PackedTokens<Unit> x(tokens + first * inner, std::min(pass, rows - first), inner, threads);
    const int64_t pairs = x.blocks / 2;
#pragma omp parallel num_threads(threads)
    {
      const typename Unit::Configuration configured;
      const Scratch<uint8_t> panel(Unit::kPanelBytes);
      int32_t* const waiting = (int32_t*)kept_memory<Waiting>(panels * pairs * kSums * sizeof(int32_t));
#pragma omp for schedule(dynamic, 1)
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = group * panels, to = std::min(from + panels, blocks);
        for (int64_t stretch = 0; stretch < x.stretches; ++stretch) {
          const int64_t step = stretch * x.stretch, count = std::min(x.stretch, x.steps - step);
          const bool last = stretch + 1 == x.stretches;
          for (int64_t block = from; block < to; ++block) {
            const int64_t n = output(block), skip = block * width - n;
            const bool more = block + 1 < to || !last;
            const int64_t next = output(block + 1 < to ? block + 1 : from),
                          next_step = block + 1 < to ? step : step + count;
            int32_t* sums = waiting + (block - from) * pairs * kSums;
            for (int m = 0; m < out.matrices; ++m) matrices[m].write(n, width, step, count, panel, m * width);
            for (int64_t tile = 0; tile < 2 * count; ++tile) Unit::arrange_weights(panel + tile * 1024);
            for (int64_t pair = 0; pair < pairs; ++pair, sums += kSums) {
              const int64_t row = first + pair * kPair, left = std::min(kPair, rows - row);
              for (int m = 0; more && m < out.matrices; ++m)
                matrices[m].source().fetch(next + width * pair / pairs, next + width * (pair + 1) / pairs, next_step,
                                           std::min(x.stretch, x.steps - next_step));
              if (last) results.fetch_to_write(row, row + left, n * out.size);
              const uint8_t* tiles[2] = {x.tile(2 * pair, step), x.tile(2 * pair + 1, step)};
              unit.multiply(panel, tiles, x.begin(2 * pair), row, left, step, count, stretch == 0, sums);
              if (last && out.matrices == 1) put_sums<Unit, Sums, 1>(sums, n, skip, row, rows, put);
              if (last && out.matrices == 2) put_sums<Unit, Sums, 2>(sums, n, skip, row, rows, put);
            }
          }
        }
      }
    }
  }
}

// A matrix of weights [columns, inner] of W, multiplied as Number.
template <typename W>
struct NumberMatrix {
  const W* data;
  int64_t inner;

  Rows source() const { return {data, inner * (int64_t)sizeof(W), kNumbers * (int64_t)sizeof(W)}; }

  void write(int64_t n, int64_t outputs, int64_t step, int64_t count, uint8_t* panel, int64_t at) const {
    for (int64_t i = 0; i < outputs; ++i)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * kNumbers;
        copy_step<Number>(data + (n + i) * inner + k, inner - k, panel + (s * 32 + at + i) * 64);
      }
  }
};

// The same for int8 tokens with int8 weights, or for floats with floats, by a unit without state.
template <typename X, typename Matrix, typename Put>
void for_panels(const X* tokens, int64_t rows, int64_t inner, int64_t threads, const Matrix* matrices,
                const Outputs& out, Put put) {
  constexpr bool kInt8 = std::is_same_v<X, int8_t>;
  for_panels<std::conditional_t<kInt8, IntVec, Vec>>(Unit<kInt8>(), tokens, rows, inner, threads, matrices, out, put);
}

}  // namespace afnext

#endif
