// Dot products of bytes, four neighbours per lane, exact in int32.

#pragma once

#include "vec.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(AFNEXT_NEON)
#define AFNEXT_BYTE_DOT  // bytes are multiplied without overflow, so that int8 weights need no wider integers
#endif

#if defined(AFNEXT_PANELS)

namespace afnext {

constexpr int kBytes = 4 * kLanes;  // in a vector of bytes
// Added to int8 weights before multiplication: on x86 one operand of the instruction is unsigned.
#if defined(AFNEXT_NEON)
constexpr int kWeightOffset = 0;
#else
constexpr int kWeightOffset = 128;
#endif
typedef int8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint8_t UBytes __attribute__((vector_size(kBytes)));

template <typename T>
inline UBytes load_bytes(const T* p) {
  static_assert(sizeof(T) == 1, "bytes");
  return load_as<UBytes>(p);
}

// The first `count` bytes, padded with zeros; reads nothing past them.
template <typename T>
inline UBytes load_first_bytes(const T* p, int64_t count) {
  static_assert(sizeof(T) == 1, "bytes");
#if defined(__AVX512F__)
  return (UBytes)_mm512_maskz_loadu_epi8(count <= 0 ? 0 : ~0ull >> (kBytes - count), p);
#else
  UBytes x{};
  if (count > 0) std::memcpy(&x, p, count);
  return x;
#endif
}

// total + codes * x in each lane's four bytes, x of -127 .. 127. codes: 0 .. 255; on plain AVX2 small enough that two
// products fit into int16, on NEON the bits of -128 .. 127.
inline IntVec add_dot(IntVec total, UBytes codes, Bytes x) {
#if defined(__ARM_FEATURE_DOTPROD) && defined(AFNEXT_NEON)
  return (IntVec)vdotq_s32((int32x4_t)total, (int8x16_t)codes, (int8x16_t)x);
#elif defined(AFNEXT_NEON)
  const int8x16_t a = (int8x16_t)codes, b = (int8x16_t)x;
  const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
  return (IntVec)vpadalq_s16((int32x4_t)total, pairs);
#elif defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)codes, (__m256i)x);
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
  return total + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

#if defined(AFNEXT_NEON)
// total + weights * token in each lane: a token's word at this index, of four bytes or a float, times all lanes'
// weights.
template <int WORD>
inline IntVec add_word(IntVec total, IntVec weights, IntVec token) {
#if defined(__ARM_FEATURE_DOTPROD)
  return (IntVec)vdotq_laneq_s32((int32x4_t)total, (int8x16_t)weights, (int8x16_t)token, WORD);
#else
  return add_dot(total, (UBytes)weights, (Bytes)vdupq_laneq_s32((int32x4_t)token, WORD));
#endif
}
template <int WORD>
inline Vec add_word(Vec total, Vec weights, Vec token) {
  return (Vec)vfmaq_laneq_f32((float32x4_t)total, (float32x4_t)weights, (float32x4_t)token, WORD);
}
#endif

#if defined(__AVX2__)
// total + a * b in each lane's two 16-bit integers.
inline IntVec add_pairs(IntVec total, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (IntVec)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
  return total + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#endif

// The high codes of bytes with two 4-bit codes each.
inline UBytes upper_codes(BitVec words) {
#if defined(AFNEXT_NEON)
  return (UBytes)words >> 4;  // otherwise gcc shifts words and clears bits
#else
  return (UBytes)((words >> 4) & 0x0F0F0F0F);
#endif
}

// A sum to which products of codes of 0 .. 15 with bytes of -127 .. 127 are added. Plain AVX2 and plain NEON add kMost
// of these in 16 bits.
class CodeSums {
 public:
  using Left = UBytes;
  using Right = Bytes;

  explicit CodeSums(IntVec sum = IntVec{}) : sum_(sum) {}
#if defined(AFNEXT_NEON) && !defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kMost = 16;
  void add(UBytes codes, Bytes x) {
    const int8x16_t a = (int8x16_t)codes, b = (int8x16_t)x;
    low_ = vmlal_s8(low_, vget_low_s8(a), vget_low_s8(b));
    high_ = vmlal_high_s8(high_, a, b);
  }
  IntVec total() const { return sum_ + (IntVec)vpaddq_s32(vpaddlq_s16(low_), vpaddlq_s16(high_)); }
#elif defined(AFNEXT_BYTE_DOT)
  static constexpr int kMost = 16;
  void add(UBytes codes, Bytes x) { sum_ = add_dot(sum_, codes, x); }
  IntVec total() const { return sum_; }
#else
  static constexpr int kMost = 8;
  void add(UBytes codes, Bytes x) {
    products_ = kept(_mm256_add_epi16(products_, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x)));
  }
  IntVec total() const { return sum_ + (IntVec)_mm256_madd_epi16(products_, _mm256_set1_epi16(1)); }
#endif

 private:
#if defined(AFNEXT_NEON) && !defined(__ARM_FEATURE_DOTPROD)
  int16x8_t low_ = vdupq_n_s16(0), high_ = vdupq_n_s16(0);
#elif !defined(AFNEXT_BYTE_DOT)
  __m256i products_ = _mm256_setzero_si256();
#endif
  IntVec sum_;
};

#if defined(__AVX2__)
// The same for 16-bit integers, the sum of whose products has to fit in 32 bits.
class PairSums {
 public:
  using Left = IntVec;
  using Right = IntVec;
  static constexpr int kMost = 16;

  explicit PairSums(IntVec sum = IntVec{}) : sum_(sum) {}
  void add(IntVec a, IntVec b) { sum_ = kept(add_pairs(sum_, a, b)); }
  IntVec total() const { return sum_; }

 private:
  IntVec sum_;
};
#else
class PairSums;  // NEON multiplies no more 16-bit integers at a time than floats
#endif

// Weights of -128 .. 127 for products with codes of -127 .. 127; on x86 |w| * (x with the sign of w).
class SignedBytes {
 public:
  explicit SignedBytes(Bytes w) : weights_(w) {}

  IntVec add_dot(IntVec total, Bytes x) const {
#if defined(AFNEXT_NEON)
    return afnext::add_dot(total, (UBytes)weights_, x);
#elif defined(__AVX512F__)
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)weights_);
    const __m512i signed_x = _mm512_mask_sub_epi8((__m512i)x, negative, _mm512_setzero_si512(), (__m512i)x);
    return afnext::add_dot(total, (UBytes)_mm512_abs_epi8((__m512i)weights_), (Bytes)signed_x);
#else
    const __m256i signed_x = _mm256_sign_epi8((__m256i)x, (__m256i)weights_);
    return afnext::add_dot(total, (UBytes)_mm256_abs_epi8((__m256i)weights_), (Bytes)signed_x);
#endif
  }

 private:
  Bytes weights_;
};

}  // namespace afnext

#endif
