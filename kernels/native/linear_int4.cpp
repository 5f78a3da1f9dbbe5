// Products with int4 weights in groups, scales[n, g] * (code[n, k] - zeros[n, g]); see linear_4bit.h.
//
// float32 and float16 activations, and all without AVX2: codes become float32. bfloat16 activations on AVX2 and up: those
// of a group become integers, and sums are made with the codes as they are stored.

#include "fixed_point.h"
#include "int_dot.h"
#include "linear_4bit.h"
#include "panels.h"

namespace afnext {
namespace {

// The even input is in a byte's low four bits. Eight is taken from each code, so that less cancels out.
struct Integers {
  static constexpr int kOffset = 8;
  static Vec number(BitVec words, int t) { return to_float((IntVec)((words >> (4 * t)) & 15) - kOffset); }
};

#if defined(__AVX2__)
// Activations as integers of 15 bits, a scale a group: of each chunk the high bytes of the even inputs, their low bytes,
// the high bytes of the odd inputs, their low bytes.
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
  int64_t row_bytes() const { return pitch_; }
  int64_t pitch() const { return pitch_; }

  template <int C, int R>
  static void dot(const BitVec* words, const int8_t* x, int64_t pitch, Vec (*sums)[R]) {
    UBytes even[C], odd[C];
    for (int c = 0; c < C; ++c) {
      even[c] = (UBytes)(words[c] & 0x0F0F0F0F);
      odd[c] = (UBytes)((words[c] >> 4) & 0x0F0F0F0F);
    }
    for (int r = 0; r < R; ++r) {
      Bytes part[4];
      for (int i = 0; i < 4; ++i) part[i] = (Bytes)load_bytes(x + r * pitch + i * kBytes);
      for (int c = 0; c < C; ++c) {
        const IntVec high = add_dot(add_dot(IntVec{}, even[c], part[0]), odd[c], part[2]);
        const IntVec low = add_dot(add_dot(IntVec{}, even[c], part[1]), odd[c], part[3]);
        sums[c][r] = to_float((high << 7) + low);
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
    for (int64_t i = 0; i < group; i += 2 * kLanes) {  // a lane holds a pair of neighbours
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
#endif

float number(const void* values, int64_t at, int64_t kind) {
  float x = 0;
  with_dtype(kind, [&](auto zero) { x = to_float(((const decltype(zero)*)values)[at]); });
  return x;
}

#if defined(__AVX512BF16__)
// Rows of bfloat16 against the weights rounded to bfloat16.
void product_in_panels(const bfloat16* x, const Weight& weight, const Epilogue<bfloat16>& write, int64_t rows,
                      int64_t inner, int64_t group, int64_t threads) {
  const int64_t groups = inner / group;
  const auto weights = [&](int64_t n, int64_t step, int64_t count, uint8_t* panel) {
    for (int64_t i = 0; i < 32; ++i) {
      float scale = 0, zero_point = 8;
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * 32, at = (n + i) * groups + k / group;
        if (s == 0 || k % group == 0) {
          scale = number(weight.scales, at, weight.kind);
          if (weight.zeros) zero_point = number(weight.zeros, at, weight.kind);
        }
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(weight.codes + ((n + i) * inner + k) / 2));
        const IntVec pairs = (IntVec)_mm512_cvtepu8_epi32(bytes);
        store_pairs(panel + (s * 32 + i) * 64, (to_float(pairs & 15) - zero_point) * scale,
                    (to_float(pairs >> 4) - zero_point) * scale);
      }
    }
  };
  for_panels<false>(x, rows, inner, write.columns, threads, {weight.codes, inner / 2, 16}, weights, write.out, sizeof(bfloat16),
                    write);
}
#endif

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
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns};
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bfloat16>::value)
      if (!up && takes_panels(rows, columns))
        return product_in_panels((const T*)x, first, write, rows, inner, group, threads);
#endif
#if defined(__AVX2__)
    using Rows = std::conditional_t<std::is_same<T, bfloat16>::value, FixedRows, FloatRows<Integers>>;
#else
    using Rows = FloatRows<Integers>;
#endif
    product(Rows((const T*)x, rows, inner, group), first, second, write, rows, inner, group, threads);
  });
}

// The weights as numbers, [columns, inner] of dtype: scales * (codes - zeros), rounded once.
AFNEXT_EXPORT void afnext_unpack_int4(const uint8_t* weight, const void* scales, const void* zeros, void* out,
                                      int64_t columns, int64_t inner, int64_t group, int64_t group_dtype, int64_t dtype,
                                      int64_t threads) {
  using namespace afnext;
  const int64_t groups = inner / group;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_outputs(columns, columns * inner, 0, threads, [&](int64_t n, int64_t outputs, float*) {
      for (int64_t g = n * groups; g < (n + outputs) * groups; ++g) {
        const float scale = number(scales, g, group_dtype), zero_point = zeros ? number(zeros, g, group_dtype) : 8;
        T* to = (T*)out + g * group;
        const uint8_t* from = weight + g * group / 2;
        float wide[128];
        for (int i = 0; i < group / 2; ++i) {
          wide[2 * i] = scale * ((from[i] & 15) - zero_point);
          wide[2 * i + 1] = scale * ((from[i] >> 4) - zero_point);
        }
        for (int i = 0; i < group; i += kLanes) store(to + i, load(wide + i));
      }
    });
  });
}
