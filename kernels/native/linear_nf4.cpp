// Products with nf4 weights, scales[n, k / 64] * kLevels[code[n, k]], the even input in a byte's high four bits; see
// linear_4bit.h.
//
// bfloat16 activations with AVX512-BF16: a lookup converts 32 codes at once to bfloat16 levels. All others: float32.

#include "linear_4bit.h"

namespace afnext {
namespace {

constexpr int64_t kGroup = 64;
alignas(64) constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// For each lane, the level of the code in its lowest four bits.
inline Vec level(BitVec codes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)codes, _mm512_load_ps(kLevels));
#elif defined(__AVX2__)
  const __m256i index = (__m256i)codes;
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kLevels), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kLevels + 8), index);
  return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#elif defined(AFNEXT_NEON)
  const auto table = load_as<uint8x16x4_t>(kLevels);  // of bytes, four per level
  const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x03020100), (uint32x4_t)(codes & 15), 0x04040404);
  return (Vec)vqtbl4q_u8(table, vreinterpretq_u8_u32(index));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = kLevels[codes[i] & 15];
  return x;
#endif
}

struct Levels {
  static constexpr int kOffset = 8;  // the symmetric zero point: nothing to subtract
  static constexpr int kEven = 4;
  static Vec number(BitVec codes) { return level(codes); }
};

struct Group {
  float scale;
  Vec operator()(BitVec codes) const { return level(codes) * scale; }
  float one(int code) const { return kLevels[code] * scale; }
};

Group group_of(const Weight& weight, int64_t at) { return {((const float*)weight.scales)[at]}; }

#if defined(__AVX512BF16__)
// Activations as bfloat16: halfword h of a chunk's words holds the inputs 4 h .. 4 h + 3, the t-th of which is in
// vector t.
class PairRows {
 public:
  static constexpr int kOffset = Levels::kOffset;
  static constexpr int64_t kStep = kChunk;

  PairRows(const bfloat16* x, int64_t rows, int64_t inner, int64_t group)
      : groups(rows, inner / group), pitch_((inner + kChunk - 1) / kChunk * kChunk), values_(rows * pitch_) {
    std::memset((void*)values_, 0, rows * pitch_ * sizeof(bfloat16));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < inner; ++k)
        values_[row * pitch_ + k / kChunk * kChunk + k % 4 * 2 * kLanes + k % kChunk / 4] = x[row * inner + k];
      for (int64_t g = 0; g < inner / group; ++g) groups.scales(row)[g] = 1;
    }
  }

  const bfloat16* row(int64_t index) const { return values_ + index * pitch_; }
  int64_t pitch() const { return pitch_; }

  template <int C, int R>
  static void dot(const BitVec* words, const bfloat16* x, int64_t pitch, Vec (*sums)[R]) {
    const __m512 levels = _mm512_load_ps(kLevels);
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(levels, levels);  // twice, for an index of five bits
    __m512bh tokens[R][4];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < 4; ++t) tokens[r][t] = (__m512bh)_mm512_loadu_si512(x + r * pitch + t * 2 * kLanes);
    for (int c = 0; c < C; ++c) {
      const __m512i w = (__m512i)words[c];
      const __m512i codes[4] = {_mm512_srli_epi16(w, 4), w, _mm512_srli_epi16(w, 12), _mm512_srli_epi16(w, 8)};
      __m512 total[R];
      for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
      for (int t = 0; t < 4; ++t) {
        const __m512bh numbers = (__m512bh)_mm512_permutexvar_epi16(codes[t], table);
        for (int r = 0; r < R; ++r) total[r] = _mm512_dpbf16_ps(total[r], numbers, tokens[r][t]);
      }
      for (int r = 0; r < R; ++r) sums[c][r] = (Vec)total[r];
    }
  }

  Groups groups;

 private:
  int64_t pitch_;
  Scratch<bfloat16> values_;
};
#endif

}  // namespace
}  // namespace afnext

// x: [rows, inner] of dtype; weight, up: [columns, inner / 2]; scales: [columns, inner / 64] float32; up: of a SwiGLU
// pair, or null; bias: [columns] float32 or null; residual, null or, and out: [rows, columns] of dtype.
AFNEXT_EXPORT void afnext_linear_nf4(const void* x, const uint8_t* weight, const float* scales, const uint8_t* up,
                                     const float* up_scales, const float* bias, const void* residual, void* out,
                                     int64_t rows, int64_t columns, int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
#if defined(__AVX512BF16__)
    using Rows = std::conditional_t<std::is_same<T, bfloat16>::value, PairRows, FloatRows<Levels>>;
#else
    using Rows = FloatRows<Levels>;
#endif
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up != nullptr};
    const Weight first{weight, scales, nullptr, kFloat32}, second{up, up_scales, nullptr, kFloat32};
    multiply_4bit<Nibbles, Levels, Rows>((const T*)x, first, second, group_of, write, rows, inner, kGroup, threads);
  });
}

// Dequantizes the weights, [columns, inner] of dtype: scales * levels, rounded once.
AFNEXT_EXPORT void afnext_unpack_nf4(const uint8_t* weight, const float* scales, void* out, int64_t columns,
                                     int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Weight packed{weight, scales, nullptr, kFloat32};
  with_dtype(dtype, [&](auto zero) {
    unpack_4bit<Nibbles, Levels>(packed, group_of, (decltype(zero)*)out, columns, inner, kGroup, threads);
  });
}
