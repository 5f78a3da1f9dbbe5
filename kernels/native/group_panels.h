// Products of many rows of int8 with int4 weights, both with a scale a group of inputs, by dot products of bytes.
//
// A step is 64 inputs, of one group or of two. Its sums are exact in int32; scaled, they are added in float32 to those of
// the steps before, which costs a fifth of the multiplications beside them. Codes take part as they are stored, 0 .. 15,
// the unsigned side of the instruction; the sums begin with minus eight times those of the token's codes.

#pragma once

#include "panels.h"

#if defined(__AVX2__)

namespace afnext {

// What the product takes of the tokens besides their codes: of each part, 64 inputs or a group of 32, and each token.
class TokenGroups {
 public:
  TokenGroups(const int8_t* codes, const float* scales, int64_t rows, int64_t inner, int64_t group, int64_t threads)
      : parts(group == 32 ? 2 : 1), padded_((rows + kPair - 1) / kPair * kPair),
        scales_(count(inner)), sums_(count(inner)), begin_(count(inner)) {
    const int64_t width = 64 / parts;
    std::memset(scales_, 0, count(inner) * sizeof(float));
    std::memset(sums_, 0, count(inner) * sizeof(float));
    std::memset(begin_, 0, count(inner) * sizeof(int32_t));
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; k += width) {
        int32_t total = 0;
        for (int64_t i = k; i < std::min(k + width, inner); ++i) total += codes[row * inner + i];
        const int64_t at = k / width * padded_ + row;
        scales_[at] = scales[row * (inner / group) + k / group];
        sums_[at] = scales_[at] * total;
        begin_[at] = -8 * total;
      }
  }

  const float* scales(int64_t part, int64_t row) const { return scales_ + part * padded_ + row; }
  const float* sums(int64_t part, int64_t row) const { return sums_ + part * padded_ + row; }
  const int32_t* begin(int64_t part, int64_t row) const { return begin_ + part * padded_ + row; }

  const int64_t parts;  // of a step

 private:
  static constexpr int64_t kPair = 2 * VectorUnit::kTile;

  int64_t count(int64_t inner) const { return (inner + 63) / 64 * parts * padded_; }

  int64_t padded_;
  Scratch<float> scales_, sums_;
  Scratch<int32_t> begin_;
};

// Behind the panel's weights stand, of every part, the 32 outputs' scales and, with ZEROS, scale * (zero - 8).
template <bool ZEROS>
struct GroupUnit : VectorUnit {
  using Element = int8_t;
  static constexpr int64_t kPanelBytes = kSteps * (2048 + 2 * 2 * 32 * sizeof(float));

  explicit GroupUnit(const TokenGroups& tokens_of_groups) : tokens(tokens_of_groups) {}

  const TokenGroups& tokens;

  static float* scales(uint8_t* panel, int64_t part) { return (float*)(panel + kSteps * 2048) + part * 64; }
  static const float* scales(const uint8_t* panel, int64_t part) { return scales((uint8_t*)panel, part); }

  static void arrange_weights(uint8_t* tile) { transpose_tile((const uint32_t*)tile, (uint32_t*)tile); }
  static int32_t begin(const int8_t*, int64_t) { return 0; }  // each group's sums begin with their own

  // sums: [2 * kTile tokens][32 outputs] of float32.
  void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t*, int64_t row, int64_t row_count,
                int64_t step, int64_t count, bool fresh, int32_t* to) const {
    auto* sums = (float*)to;
    if (fresh) std::memset(sums, 0, 2 * kTile * 32 * sizeof(float));
    const auto run = tokens.parts == 1 ? &GroupUnit::multiply_rows<1> : &GroupUnit::multiply_rows<2>;
    for (int output = 0; output < 32; output += 2 * kLanes)
      for (int token = 0; token < row_count; token += kRows)
        (this->*run)(panel, output, tiles[token / kTile] + token % kTile * 64, row + token, step, count,
                     sums + token * 32 + output);
  }

 private:
  template <int PARTS>
  void multiply_rows(const uint8_t* panel, int output, const uint8_t* bytes, int64_t row, int64_t step, int64_t count,
                     float* sums) const {
    constexpr int kFours = 16 / PARTS, kRun = std::min(kFours, CodeSums::kMost);  // inputs by four: of a part, of one sum
    const uint8_t* first = panel + output / 16 * 1024 + output % 16 * 4;
    for (int64_t s = 0; s < count; ++s, bytes += kTile * 64)
      for (int half = 0; half < PARTS; ++half) {
        const int64_t part = (step + s) * PARTS + half;
        const int32_t* begin = tokens.begin(part, row);
        IntVec total[kRows][2];
        for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = IntVec{} + begin[i];
        for (int run = 0; run < kFours; run += kRun) {
          CodeSums codes[kRows][2];
#pragma GCC unroll 16
          for (int four = run; four < run + kRun; ++four) {
            const int at = half * 64 / PARTS + four * 4;
            const uint8_t* weights = first + s * 2048 + at * 16;
            const UBytes by[2] = {load_bytes(weights), load_bytes(weights + kNextLanes)};
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              const Bytes all = (Bytes)broadcast_ints(bytes + i * 64 + at);
#pragma GCC unroll 2
              for (int w = 0; w < 2; ++w) codes[i][w].add(by[w], all);
            }
          }
          for (int i = 0; i < kRows; ++i)
            for (int w = 0; w < 2; ++w) total[i][w] += codes[i][w].total();
          asm volatile("" : : : "memory");  // or gcc keeps the sums of all parts in registers, and spills
        }
        add_part(total, scales(panel, s * PARTS + half) + output, part, row, sums);
      }
  }

  void add_part(const IntVec (&total)[kRows][2], const float* scales, int64_t part, int64_t row, float* sums) const {
    const float* by = tokens.scales(part, row);
    const float* shift = tokens.sums(part, row);
#pragma GCC unroll 2
    for (int w = 0; w < 2; ++w) {
      const Vec scale = load(scales + w * kLanes), zero = load(scales + 32 + w * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        float* sum = sums + i * 32 + w * kLanes;
        Vec y = load(sum) + to_float(total[i][w]) * scale * by[i];
        if (ZEROS) y -= zero * shift[i];
        store(sum, y);
      }
    }
  }
};

}  // namespace afnext

#endif
