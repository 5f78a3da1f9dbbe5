// Integer products of many rows, with one scale per group of inputs for the activations and another for the weights.
//
// Activations have 8 bits (W4A8: sums of products of bytes), or, at levels without fast bfloat16 products, 15 bits in
// its place (fixed_point.h: sums of 16-bit products, twice as fast as float32). A group's sums are exact in int32. They
// are scaled and added in float32 to those of earlier groups. With groups of 64 inputs, this takes a fifth of the time
// of the byte multiplications; the share is smaller for longer groups or 16 bits.
// As bytes, int4 codes are 0 .. 15, the unsigned operand of the instruction, and the sums begin with -8 times the sum
// of the token's codes; in 16 bits the codes are -8 .. 7.

#pragma once

#include "fixed_point.h"
#include "panels.h"

#if defined(AFNEXT_PANELS)

namespace afnext {

// Whether activations of T are multiplied with panels as 15-bit integers.
#if defined(AFNEXT_NEON)
template <typename T>
constexpr bool kFixedPoint = false;
#else
template <typename T>
constexpr bool kFixedPoint = std::is_same_v<T, bfloat16> && std::is_same_v<Number, float>;
#endif

// The tokens' codes, [rows, inner] of int8 or int16, and for each group and token its scale and the terms that the
// product derives from the sum of its codes. The last group may be short.
template <typename Code>
class TokenGroups {
 public:
  TokenGroups(const int8_t* codes, const float* scales, int64_t rows, int64_t inner, int64_t group, int64_t threads)
      : TokenGroups(codes, rows, inner, group) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; k += group) {
        int32_t total = 0;
        for (int64_t i = k; i < std::min(k + group, inner); ++i) total += codes[row * inner + i];
        put(row, k / group, {scales[(row * inner + k) / group], total});
      }
  }

  // inner, group: multiples of 16.
  TokenGroups(const bfloat16* x, int64_t rows, int64_t inner, int64_t group, int64_t threads)
      : TokenGroups((Code*)kept_memory<TokenGroups>(rows * inner * sizeof(Code)), rows, inner, group) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; k += group) {
        const int64_t at = row * inner + k;
        put(row, k / group, to_fixed_point(x + at, std::min(group, inner - k), (Code*)codes + at));
      }
  }

  const float* scales(int64_t g, int64_t row) const { return scales_ + g * padded_ + row; }
  const float* sums(int64_t g, int64_t row) const { return sums_ + g * padded_ + row; }
  const int32_t* begin(int64_t g, int64_t row) const { return begin_ + g * padded_ + row; }

  const Code* const codes;

 private:
  static constexpr int64_t kPair = 2 * VectorUnit::kTile;

  // Padded with zeros to whole tiles of tokens and to a whole step of groups.
  TokenGroups(const Code* codes_, int64_t rows, int64_t inner, int64_t group)
      : codes(codes_),
        padded_((rows + kPair - 1) / kPair * kPair),
        count_(((inner + group - 1) / group + 1) * padded_),
        scales_(count_),
        sums_(count_),
        begin_(count_) {
    std::memset(scales_, 0, count_ * sizeof(float));
    std::memset(sums_, 0, count_ * sizeof(float));
    std::memset(begin_, 0, count_ * sizeof(int32_t));
  }

  void put(int64_t row, int64_t g, const FixedPoint& of) {
    const int64_t at = g * padded_ + row;
    scales_[at] = of.scale;
    sums_[at] = of.scale * of.total;
    begin_[at] = sizeof(Code) == 1 ? -8 * of.total : 0;
  }

  int64_t padded_, count_;
  Scratch<float> scales_, sums_;
  Scratch<int32_t> begin_;
};

// The panel's weights are followed, for each group of the stretch, by the 32 outputs' scales and scale * (zero - 8).
inline float* group_scales(uint8_t* panel, int64_t g) { return (float*)(panel + VectorUnit::kSteps * 2048) + g * 64; }

// Groups of GROUP inputs, all with zero point 8 unless ZEROS.
template <typename Code, int GROUP, bool ZEROS>
struct GroupUnit : VectorUnit {
  using Element = Code;
  using Sums = std::conditional_t<sizeof(Code) == 1, CodeSums, PairSums>;
  static constexpr int kWords = GROUP * sizeof(Code) / 4;  // of four bytes; a step has 16
  static constexpr int64_t kGranule = std::max(1, kWords / 16);
  static constexpr int64_t kGroups = kSteps * 16 / kWords,
                           kPanelBytes = kSteps * 2048 + kGroups * 2 * 32 * sizeof(float);

  explicit GroupUnit(const TokenGroups<Code>& tokens_of_groups) : tokens(tokens_of_groups) {}

  const TokenGroups<Code>& tokens;

  static void arrange_weights(uint8_t* tile) { transpose_tile((const uint32_t*)tile, (uint32_t*)tile); }
  static int32_t begin(const Code*, int64_t) { return 0; }  // each group's sums begin with their own

  // sums: [2 * kTile tokens][32 outputs] of float32.
  void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t*, int64_t row, int64_t row_count,
                int64_t step, int64_t count, bool fresh, int32_t* to) const {
    auto* sums = (float*)to;
    if (fresh) std::memset(sums, 0, 2 * kTile * 32 * sizeof(float));
    for (int output = 0; output < 32; output += 2 * kLanes)
      for (int token = 0; token < row_count; token += kRows)
        multiply_rows(panel, output, tiles[token / kTile] + token % kTile * 64, row + token, step, count,
                      sums + token * 32 + output);
  }

 private:
  void multiply_rows(const uint8_t* panel, int output, const uint8_t* bytes, int64_t row, int64_t step, int64_t count,
                     float* sums) const {
    constexpr int kRun = std::min(std::min(kWords, 16), Sums::kMost);
    const uint8_t* first = panel + output / 16 * 1024 + output % 16 * 4;
    for (int64_t begin = 0, g = step * 16 / kWords; begin < count * 16; begin += kWords, ++g) {
      IntVec total[kRows][2];
      const int32_t* from = tokens.begin(g, row);
      for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = IntVec{} + from[i];
      for (int64_t word = begin; word < std::min(begin + kWords, count * 16); word += kRun) {
        const uint8_t* weights = first + word / 16 * 2048 + word % 16 * 64;
        add_run<kRun>(weights, bytes + word / 16 * kTile * 64 + word % 16 * 4, total);
      }
      add_group(total, group_scales((uint8_t*)panel, begin / kWords) + output, g, row, sums);
    }
  }

  // Adds the products of this many words.
  template <int WORDS>
  static void add_run(const uint8_t* weights, const uint8_t* bytes, IntVec (&total)[kRows][2]) {
#if defined(__ARM_FEATURE_DOTPROD)
    for (int word = 0; word < WORDS; word += 4)
      for_four_words([&](int w) { return weights + (word + w) * 64; }, [&](int i) { return bytes + i * 64 + word * 4; },
                     total);
#else
    Sums sums[kRows][2];
    for (int i = 0; i < kRows; ++i)
      for (int w = 0; w < 2; ++w) sums[i][w] = Sums(total[i][w]);
#pragma GCC unroll 16
    for (int word = 0; word < WORDS; ++word) {
      const auto load_left = [&](const uint8_t* p) { return load_as<typename Sums::Left>(p); };
      const typename Sums::Left by[2] = {load_left(weights + word * 64), load_left(weights + kNextLanes + word * 64)};
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto all = (typename Sums::Right)broadcast_ints(bytes + i * 64 + word * 4);
#pragma GCC unroll 2
        for (int w = 0; w < 2; ++w) sums[i][w].add(by[w], all);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int w = 0; w < 2; ++w) total[i][w] = sums[i][w].total();
    asm volatile("" : : : "memory");  // otherwise gcc keeps the sums of all parts in registers, and spills
#endif
  }

  void add_group(const IntVec (&total)[kRows][2], const float* scales, int64_t g, int64_t row, float* sums) const {
    const float* by = tokens.scales(g, row);
    const float* shift = tokens.sums(g, row);
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
