// Dot products of bytes, four neighbours a lane, exact in int32.

#pragma once

#include "vec.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define AFNEXT_VNNI  // one instruction adds four products to a lane, without overflow between them
#endif

#if defined(__AVX2__)

namespace afnext {

constexpr int kBytes = 4 * kLanes;  // in a vector of bytes
typedef int8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint8_t UBytes __attribute__((vector_size(kBytes)));

template <typename T>
inline UBytes load_bytes(const T* p) {
  static_assert(sizeof(T) == 1, "bytes");
  return load_as<UBytes>(p);
}

// The first `count` bytes, zeros behind them; reads nothing past them.
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

// total + codes * x in each lane's four bytes; codes: 0 .. 255, on plain AVX2 so small that two products fit into int16.
inline IntVec add_dot(IntVec total, UBytes codes, Bytes x) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)codes, (__m256i)x);
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
  return total + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// total + a * b in each lane's two integers of 16 bits.
inline IntVec add_pairs(IntVec total, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (IntVec)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
  return total + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// A sum, and products added to it of codes of 0 .. 15 with bytes of -127 .. 127. Plain AVX2 adds kMost of them in 16 bits.
class CodeSums {
 public:
  using Left = UBytes;
  using Right = Bytes;

  explicit CodeSums(IntVec sum = IntVec{}) : sum_(sum) {}
#if defined(AFNEXT_VNNI)
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
#if !defined(AFNEXT_VNNI)
  __m256i products_ = _mm256_setzero_si256();
#endif
  IntVec sum_;
};

// The same of integers of 16 bits, whose products have to fit together into 32.
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

// Weights of -128 .. 127, to be multiplied with codes of -127 .. 127: |w| * (x with the sign of w).
class SignedBytes {
 public:
  explicit SignedBytes(Bytes w) : weights_(w) {}

  IntVec add_dot(IntVec total, Bytes x) const {
#if defined(__AVX512F__)
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
