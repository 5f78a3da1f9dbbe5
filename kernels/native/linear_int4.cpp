// Products with int4 weights in groups, scales[n, g] * (code[n, k] - zeros[n, g]); see linear_4bit.h. int3 weights are int4
// weights whose codes are even; see even_nibbles.h.
//
// float32 and float16 activations, and all activations at the portable level: codes become float32. bfloat16
// activations from AVX2 and NEON on: those of a group become integers, which are multiplied with the stored codes.

#include "even_nibbles.h"
#include "fixed_point.h"
#include "group_panels.h"
#include "int_dot.h"
#include "linear_4bit.h"
#include "quantize_rows.h"

namespace afnext {
namespace {

// The even input is in a byte's low four bits. Subtracting eight from each code reduces cancellation.
struct Integers {
  static constexpr int kOffset = 8, kEven = 0;
  static Vec number(BitVec codes) { return to_float((IntVec)(codes & 15) - kOffset); }
};

#if defined(AFNEXT_PANELS)
// Activations as 15-bit integers with one scale per group: for each chunk, the high bytes of the even inputs, their low
// bytes, the high bytes of the odd inputs, their low bytes.
class FixedRows {
 public:
  static constexpr int kOffset = 0;

  template <typename T>
  FixedRows(const T* x, int64_t rows, int64_t inner, int64_t group)
      : groups(rows, inner / group), pitch_((inner + kChunk - 1) / kChunk * 2 * kChunk), bytes_(rows * pitch_) {
    std::memset(bytes_, 0, rows * pitch_);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; k += group) round_group(x + row * inner + k, group, row, k);
  }

  static constexpr int64_t kStep = 2 * kChunk;

  const int8_t* row(int64_t index) const { return bytes_ + index * pitch_; }
  int64_t pitch() const { return pitch_; }

  template <int C, int R>
  static AFNEXT_ALWAYS_INLINE void dot(const BitVec* words, const int8_t* x, int64_t pitch, Vec (*sums)[R]) {
    UBytes even[C], odd[C];
    for (int c = 0; c < C; ++c) {
      even[c] = (UBytes)(words[c] & 0x0F0F0F0F);
      odd[c] = upper_codes(words[c]);
    }
    for (int r = 0; r < R; ++r) {
      Bytes part[4];
      for (int i = 0; i < 4; ++i) part[i] = (Bytes)load_bytes(x + r * pitch + i * kBytes);
      for (int c = 0; c < C; ++c) {
#if defined(AFNEXT_NEON)
        CodeSums high;
        high.add(even[c], part[0]);
        high.add(odd[c], part[2]);
        CodeSums low(high.total() << 7);  // starts from the sum of the high bytes; needs no zeros
        low.add(even[c], part[1]);
        low.add(odd[c], part[3]);
        sums[c][r] = to_float(low.total());
#else
        CodeSums high, low;
        high.add(even[c], part[0]);
        low.add(even[c], part[1]);
        high.add(odd[c], part[2]);
        low.add(odd[c], part[3]);
        sums[c][r] = to_float((high.total() << 7) + low.total());
#endif
      }
    }
  }

  Groups groups;

 private:
  template <typename T>
  void round_group(const T* x, int64_t group, int64_t row, int64_t first) {
    alignas(64) int16_t codes[128];
    const FixedPoint rounded = to_fixed_point(x, group, codes);
    groups.scales(row)[first / group] = rounded.scale;
    groups.sums(row)[first / group] = rounded.scale * rounded.total;
    for (int64_t i = 0; i < group; i += 2 * kLanes) {  // a lane holds two neighbouring inputs
      const IntVec pairs = (IntVec)load_words((const uint8_t*)(codes + i), sizeof pairs);
      const int64_t k = first + i;
      int8_t* at = bytes_ + row * pitch_ + k / kChunk * 2 * kChunk + k % kChunk / 2;
      put_bytes(pairs << 16 >> 16, at, at + kBytes);
      put_bytes(pairs >> 16, at + 2 * kBytes, at + 3 * kBytes);
    }
  }

  int64_t pitch_;
  Scratch<int8_t> bytes_;
};

// int8 activations with one scale per group: for each chunk, the even inputs, then the odd ones.
class ByteRows {
 public:
  static constexpr int kOffset = 0;

  ByteRows(const int8_t* x, const float* scales, int64_t rows, int64_t inner, int64_t group)
      : groups(rows, inner / group), pitch_((inner + kChunk - 1) / kChunk * kChunk), bytes_(rows * pitch_) {
    std::memset(bytes_, 0, rows * pitch_);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t first = 0; first < inner; first += group) {
        const int64_t at = row * (inner / group) + first / group;
        const int32_t total = part(x + row * inner + first, group, bytes_ + row * pitch_, first);
        groups.scales(row)[first / group] = scales[at];
        groups.sums(row)[first / group] = scales[at] * total;
      }
  }

  static constexpr int64_t kStep = kChunk;

  const int8_t* row(int64_t index) const { return bytes_ + index * pitch_; }
  int64_t pitch() const { return pitch_; }

  template <int C, int R>
  static AFNEXT_ALWAYS_INLINE void dot(const BitVec* words, const int8_t* x, int64_t pitch, Vec (*sums)[R]) {
    for (int r = 0; r < R; ++r) {
      const Bytes even = (Bytes)load_bytes(x + r * pitch), odd = (Bytes)load_bytes(x + r * pitch + kBytes);
      for (int c = 0; c < C; ++c) {
        CodeSums codes;
        codes.add((UBytes)(words[c] & 0x0F0F0F0F), even);
        codes.add(upper_codes(words[c]), odd);
        sums[c][r] = to_float(codes.total());
      }
    }
  }

  Groups groups;

 private:
  // Stores a group's inputs, which begin at input `first` of the row, in this layout; returns their sum.
  static int32_t part(const int8_t* from, int64_t group, int8_t* row, int64_t first) {
    IntVec total{};
    for (int64_t i = 0; i < group; i += 2 * kLanes) {
      const auto pairs = load_as<ShortVec>(from + i);
      const int64_t k = first + i;
      int8_t* to = row + k / kChunk * kChunk + k % kChunk / 2;
      const ShortVec both[2] = {pairs << 8 >> 8, pairs >> 8};
      for (int odd = 0; odd < 2; ++odd) {
        const IntVec wide = widen(both[odd]);
        total += wide;
        const ByteVec bytes = narrow_to_bytes(wide);
        std::memcpy(to + odd * kBytes, &bytes, sizeof bytes);
      }
    }
    return sum(total);
  }

  int64_t pitch_;
  Scratch<int8_t> bytes_;
};
#endif

float number(const void* values, int64_t at, int64_t kind) {
  float x = 0;
  with_dtype(kind, [&](auto zero) { x = to_float(((const decltype(zero)*)values)[at]); });
  return x;
}

struct Group {
  float scale, zero;
  Vec operator()(BitVec codes) const { return (to_float((IntVec)(codes & 15)) - zero) * scale; }
  float one(int code) const { return (code - zero) * scale; }
};

Group group_of(const Weight& weight, int64_t at) {
  return {number(weight.scales, at, weight.kind), weight.zeros ? number(weight.zeros, at, weight.kind) : 8};
}

#if defined(AFNEXT_PANELS)
// The stored codes of `count` bytes, at most 32, one per byte, padded with zeros.
inline void put_codes(const uint8_t* packed, int64_t count, uint8_t* out) {
  uint8_t whole[32] = {};
  if (count < 32) packed = (const uint8_t*)std::memcpy(whole, packed, count);
#if defined(AFNEXT_NEON)
  for (int i = 0; i < 32; i += 16) {
    const uint8x16_t both = vld1q_u8(packed + i);
    const uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
    vst1q_u8(out + 2 * i, vzip1q_u8(low, high));
    vst1q_u8(out + 2 * i + 16, vzip2q_u8(low, high));
  }
#else
  for (int i = 0; i < 32; i += kLanes) {
    const HalfVec wide = __builtin_convertvector(load_as<UByteVec>(packed + i), HalfVec);
    const HalfVec codes = (wide | wide << 4) & 0x0F0F;  // a byte's upper code goes to the byte above
    std::memcpy(out + 2 * i, &codes, sizeof codes);
  }
#endif
}

// The codes of 16 bytes minus 8, one per 16 bits.
inline void put_wide_codes(const uint8_t* packed, uint8_t* out) {
  typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
  for (int i = 0; i < 16; i += kLanes) {
    const BitVec wide = widen(load_as<UByteVec>(packed + i));
    const Shorts codes = (Shorts)((wide | wide << 12) & 0x000F000F) - 8;
    std::memcpy(out + 4 * i, &codes, sizeof codes);
  }
}

// A matrix in the form in which GroupUnit multiplies it with tokens of Code.
template <typename Packing, typename Code>
struct GroupMatrix {
  static constexpr int64_t kInputs = 64 / sizeof(Code);

  const Weight& weight;
  int64_t inner, group;

  Rows source() const { return {weight.codes, Packing::stored(inner), Packing::stored(kInputs)}; }

  void write(int64_t n, int64_t outputs, int64_t step, int64_t count, uint8_t* panel, int64_t at) const {
    const int64_t start = step * kInputs, inputs = std::min(count * kInputs, inner - start);
    for (int64_t i = 0; i < outputs; ++i) {
      alignas(64) uint8_t space[kStretchBytes];
      const uint8_t* codes = Packing::codes(weight.codes, (n + i) * inner + start, inputs, space);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = start + s * kInputs;
        const uint8_t* from = codes + s * kInputs / 2;
        uint8_t* to = panel + (s * 32 + at + i) * 64;
        sizeof(Code) == 1 ? put_codes(from, std::min<int64_t>(32, (inner - k) / 2), to) : put_wide_codes(from, to);
      }
      for (int64_t k = start; k < (step + count) * kInputs; k += group) {
        const Group by = k < inner ? group_of(weight, (n + i) * (inner / group) + k / group) : Group{0, 0};
        float* scales = group_scales(panel, (k - start) / group) + at + i;
        scales[0] = by.scale;
        scales[32] = by.scale * (by.zero - 8);
      }
    }
  }
};

// x: for TokenGroups, besides its shape.
template <typename Packing, typename Code, typename T, typename... X>
void product_in_groups(const Weight& weight, const Weight& up, const Epilogue<T>& write, int64_t rows, int64_t inner,
                       int64_t group, int64_t threads, X... x) {
  const TokenGroups<Code> tokens(x..., rows, inner, group, threads);
  const GroupMatrix<Packing, Code> matrices[2] = {{weight, inner, group}, {up, inner, group}};
  const auto multiply = [&](auto unit) {
    for_panels<Vec>(unit, tokens.codes, rows, inner, threads, matrices, Outputs(write), write);
  };
  const auto of_groups = [&](auto size) {
    weight.zeros ? multiply(GroupUnit<Code, decltype(size)::value, true>(tokens))
                 : multiply(GroupUnit<Code, decltype(size)::value, false>(tokens));
  };
  switch (group) {
    case 32: return of_groups(std::integral_constant<int, 32>());
    case 64: return of_groups(std::integral_constant<int, 64>());
    case 128: return of_groups(std::integral_constant<int, 128>());
  }
}
#endif

// The product of afnext_linear_int4.
template <typename Packing>
void multiply_groups(const void* x, const Weight& weight, const Weight& up, const float* bias, const void* residual,
                     void* out, int64_t rows, int64_t columns, int64_t inner, int64_t group, int64_t dtype,
                     int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
#if defined(AFNEXT_PANELS)
    using Rows = std::conditional_t<std::is_same<T, bfloat16>::value, FixedRows, FloatRows<Integers>>;
#else
    using Rows = FloatRows<Integers>;
#endif
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up.codes != nullptr};
#if defined(AFNEXT_PANELS)
    if constexpr (kFixedPoint<T>)
      if (takes_panels(rows, columns))
        return product_in_groups<Packing, int16_t>(weight, up, write, rows, inner, group, threads, (const T*)x);
#endif
    multiply_4bit<Packing, Integers, Rows>((const T*)x, weight, up, group_of, write, rows, inner, group, threads);
  });
}

}  // namespace
}  // namespace afnext

// x: [rows, inner] of dtype; weight, up: [columns, inner / 2], the even input in a byte's low four bits; scales, zeros:
// [columns, inner / group] of group_dtype, group 32, 64 or 128, zeros null for 8; up: of a SwiGLU pair, or null; bias:
// [columns] float32 or null; residual, null or, and out: [rows, columns] of dtype.
AFNEXT_EXPORT void afnext_linear_int4(const void* x, const uint8_t* weight, const void* scales, const void* zeros,
                                      const uint8_t* up, const void* up_scales, const void* up_zeros, const float* bias,
                                      const void* residual, void* out, int64_t rows, int64_t columns, int64_t inner,
                                      int64_t group, int64_t group_dtype, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Weight first{weight, scales, zeros, group_dtype}, second{up, up_scales, up_zeros, group_dtype};
  multiply_groups<Nibbles>(x, first, second, bias, residual, out, rows, columns, inner, group, dtype, threads);
}

// As afnext_linear_int4, with weights [columns, inner * 3 / 8]; inner: a multiple of 128.
AFNEXT_EXPORT void afnext_linear_int3(const void* x, const uint8_t* weight, const void* scales, const void* zeros,
                                      const uint8_t* up, const void* up_scales, const void* up_zeros, const float* bias,
                                      const void* residual, void* out, int64_t rows, int64_t columns, int64_t inner,
                                      int64_t group, int64_t group_dtype, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Weight first{weight, scales, zeros, group_dtype}, second{up, up_scales, up_zeros, group_dtype};
  multiply_groups<EvenNibbles>(x, first, second, bias, residual, out, rows, columns, inner, group, dtype, threads);
}

// As afnext_linear_int4, with each group of the rows rounded to int8 first.
AFNEXT_EXPORT void afnext_linear_w4a8(const void* x, const uint8_t* weight, const void* scales, const void* zeros,
                                      const uint8_t* up, const void* up_scales, const void* up_zeros, const float* bias,
                                      const void* residual, void* out, int64_t rows, int64_t columns, int64_t inner,
                                      int64_t group, int64_t group_dtype, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Weight first{weight, scales, zeros, group_dtype}, second{up, up_scales, up_zeros, group_dtype};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const QuantizedRows by((const T*)x, rows * (inner / group), group, threads);
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up != nullptr};
#if defined(AFNEXT_PANELS)
    if (takes_panels(rows, columns))
      return product_in_groups<Nibbles, int8_t>(first, second, write, rows, inner, group, threads,
                                                (const int8_t*)by.codes, (const float*)by.scales);
    product<Nibbles>(ByteRows(by.codes, by.scales, rows, inner, group), first, second, write, rows, inner, group,
                     threads);
#else
    Scratch<float> wide(rows * inner);
    for (int64_t i = 0; i < rows * inner; ++i) wide[i] = by.codes[i] * by.scales[i / group];
    product<Nibbles>(FloatRows<Integers>((const float*)wide, rows, inner, group), first, second, write, rows, inner, group, threads);
#endif
  });
}

// Dequantizes the weights, [columns, inner] of dtype: scales * (codes - zeros), rounded once.
AFNEXT_EXPORT void afnext_unpack_int4(const uint8_t* weight, const void* scales, const void* zeros, void* out,
                                      int64_t columns, int64_t inner, int64_t group, int64_t group_dtype, int64_t dtype,
                                      int64_t threads) {
  using namespace afnext;
  const Weight packed{weight, scales, zeros, group_dtype};
  with_dtype(dtype, [&](auto zero) {
    unpack_4bit<Nibbles, Integers>(packed, group_of, (decltype(zero)*)out, columns, inner, group, threads);
  });
}

// The same for int3 weights, [columns, inner * 3 / 8].
AFNEXT_EXPORT void afnext_unpack_int3(const uint8_t* weight, const void* scales, const void* zeros, void* out,
                                      int64_t columns, int64_t inner, int64_t group, int64_t group_dtype, int64_t dtype,
                                      int64_t threads) {
  using namespace afnext;
  const Weight packed{weight, scales, zeros, group_dtype};
  with_dtype(dtype, [&](auto zero) {
    unpack_4bit<EvenNibbles, Integers>(packed, group_of, (decltype(zero)*)out, columns, inner, group, threads);
  });
}
