// A float32 vector of the level's register width, by the compilers' vector extensions, which support +, *, comparisons
// and indexing. Loads and stores convert bfloat16 and float16, rounding to nearest even as torch does.

#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(AFNEXT_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX2__) || defined(AFNEXT_NEON)
#define AFNEXT_PANELS  // the level has products of bytes (int_dot.h) and of many rows (panels.h)
#endif
#if defined(AFNEXT_NEON) && defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define AFNEXT_MMLA  // an instruction multiplies 2 x 8 bytes with 8 x 2, or 2 x 4 bfloat16 with 4 x 2
#endif
#if defined(__AVX512BF16__) || defined(AFNEXT_MMLA)
#define AFNEXT_BFLOAT16  // panels hold bfloat16, not float32
#endif

namespace afnext {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t UByteVec __attribute__((vector_size(kLanes)));

template <typename Vector>
inline Vector load_as(const void* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Keeps a sum in a register, and the order of additions: with 16 registers, gcc computes many products first, and
// spills.
template <typename Sum>
inline Sum kept(Sum sum) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm volatile("" : "+x"(sum));
#endif
  return sum;
}

// Conversions to lanes of other widths; narrowed values have to fit. gcc splits __builtin_convertvector: on AVX2 into
// single bytes, on AVX-512 into halves when widening.
#if defined(__AVX512F__)
inline BitVec widen(HalfVec x) { return (BitVec)_mm512_cvtepu16_epi32((__m256i)x); }
inline IntVec widen(ShortVec x) { return (IntVec)_mm512_cvtepi16_epi32((__m256i)x); }
inline BitVec widen(UByteVec x) { return (BitVec)_mm512_cvtepu8_epi32((__m128i)x); }
inline HalfVec narrow(BitVec x) { return (HalfVec)_mm512_cvtepi32_epi16((__m512i)x); }
inline ShortVec narrow(IntVec x) { return (ShortVec)_mm512_cvtepi32_epi16((__m512i)x); }
inline ByteVec narrow_to_bytes(IntVec x) { return (ByteVec)_mm512_cvtepi32_epi8((__m512i)x); }
#elif defined(__AVX2__)
inline BitVec widen(HalfVec x) { return (BitVec)_mm256_cvtepu16_epi32((__m128i)x); }
inline IntVec widen(ShortVec x) { return (IntVec)_mm256_cvtepi16_epi32((__m128i)x); }
inline BitVec widen(UByteVec x) { return (BitVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&x)); }
inline HalfVec narrow(BitVec x) {
  const __m256i halves = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
inline ShortVec narrow(IntVec x) {
  const __m256i halves = _mm256_packs_epi32((__m256i)x, (__m256i)x);
  return (ShortVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
inline ByteVec narrow_to_bytes(IntVec x) {
  const __m128i halves = (__m128i)narrow(x), bytes = _mm_packs_epi16(halves, halves);
  ByteVec result;
  _mm_storel_epi64((__m128i*)&result, bytes);
  return result;
}
#elif defined(AFNEXT_NEON)
inline BitVec widen(HalfVec x) { return (BitVec)vmovl_u16((uint16x4_t)x); }
inline IntVec widen(ShortVec x) { return (IntVec)vmovl_s16((int16x4_t)x); }
inline BitVec widen(UByteVec x) {
  const uint8x8_t bytes = vcreate_u8(load_as<uint32_t>(&x));
  return (BitVec)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
}
inline HalfVec narrow(BitVec x) { return (HalfVec)vmovn_u32((uint32x4_t)x); }
inline ShortVec narrow(IntVec x) { return (ShortVec)vmovn_s32((int32x4_t)x); }
inline ByteVec narrow_to_bytes(IntVec x) {
  const int16x4_t halves = vmovn_s32((int32x4_t)x);
  const uint32x2_t bytes = vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves)));
  const uint32_t four = vget_lane_u32(bytes, 0);
  return load_as<ByteVec>(&four);
}
#else
inline BitVec widen(HalfVec x) { return __builtin_convertvector(x, BitVec); }
inline IntVec widen(ShortVec x) { return __builtin_convertvector(x, IntVec); }
inline BitVec widen(UByteVec x) { return __builtin_convertvector(x, BitVec); }
inline HalfVec narrow(BitVec x) { return __builtin_convertvector(x, HalfVec); }
inline ShortVec narrow(IntVec x) { return __builtin_convertvector(x, ShortVec); }
inline ByteVec narrow_to_bytes(IntVec x) { return __builtin_convertvector(x, ByteVec); }
#endif

#if defined(AFNEXT_PANELS)
// Each of kLanes / 2 bytes repeated in two lanes.
inline BitVec twice(const uint8_t* p) {
#if defined(AFNEXT_NEON)
  const uint8x8_t bytes = vcreate_u8(load_as<uint16_t>(p));
  return (BitVec)vmovl_u16(vget_low_u16(vmovl_u8(vzip1_u8(bytes, bytes))));
#else
  int64_t bytes = 0;
  std::memcpy(&bytes, p, kLanes / 2);
  const __m128i one = _mm_cvtsi64_si128(bytes), two = _mm_unpacklo_epi8(one, one);
  return widen(load_as<UByteVec>(&two));
#endif
}
#endif

inline Vec splat(float x) { return x - Vec{}; }  // 0 + x would need an addition, for -0

#if defined(AFNEXT_PANELS)
// a * b + c, rounded once, even if the compiler does not fuse * and +.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(AFNEXT_NEON)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}
#endif

inline Vec load(const float* p) { return load_as<Vec>(p); }
inline Vec load(const bfloat16* p) { return (Vec)(widen(load_as<HalfVec>(p)) << 16); }

// x: the bits of float16.
inline Vec widen_float16(HalfVec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(AFNEXT_NEON)
  return (Vec)vcvt_f32_f16((float16x4_t)x);
#else
  float16 halves[kLanes];
  std::memcpy(halves, &x, sizeof x);
  Vec wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = (float)halves[i];
  return wide;
#endif
}

inline Vec load(const float16* p) { return widen_float16(load_as<HalfVec>(p)); }

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// The upper halves are x in bfloat16.
inline BitVec rounded_to_bfloat16(Vec x) {
  const BitVec bits = (BitVec)x;
  const BitVec rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return x == x ? rounded : BitVec{} + 0x7FC00000;
}

inline void store(bfloat16* p, Vec x) {
  const HalfVec half = narrow(rounded_to_bfloat16(x) >> 16);
  std::memcpy(p, &half, sizeof half);
}

inline void store(float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(AFNEXT_NEON)
  const float16x4_t halves = vcvt_f16_f32((float32x4_t)x);
  std::memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = (float16)x[i];
#endif
}

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(AFNEXT_NEON)
  const int8x8_t bytes = vcreate_s8(load_as<uint32_t>(p));
  return (Vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
  return __builtin_convertvector(load_as<ByteVec>(p), Vec);
#endif
}

inline IntVec to_int(Vec x) { return __builtin_convertvector(x, IntVec); }  // towards zero
inline Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }

// To the nearest integer, ties to even, for |x| < 2^22.
inline Vec round_even(Vec x) { return (x + 12582912.0f) - 12582912.0f; }

// The first `count` (< kLanes) elements, padded with zeros; reads nothing past them.
template <typename T>
inline Vec load_first(const T* p, int count) {
  T part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

#if defined(__AVX512F__)
inline Vec load_first(const float* p, int count) { return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, p); }

inline Vec load_first(const bfloat16* p, int count) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << count) - 1, p)), 16);
}

inline Vec load_first(const float16* p, int count) {
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}
#endif

template <typename T>
inline void store_first(T* p, Vec x, int count) {
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(AFNEXT_NEON)
  return vaddvq_f32((float32x4_t)x);
#else
  float total[kLanes];
  std::memcpy(total, &x, sizeof x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  return total[0];
#endif
}

inline int32_t sum(IntVec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(AFNEXT_NEON)
  return vaddvq_s32((int32x4_t)x);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

inline float largest(Vec x) {  // NaN if any lane is NaN
#if defined(AFNEXT_NEON)
  return vmaxvq_f32((float32x4_t)x);
#else
#if defined(__AVX512F__)
  const __m512 all = (__m512)x;
  if (!_mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q)) return _mm512_reduce_max_ps(all);
#endif
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most || x[i] != x[i] ? x[i] : most;
  return most;
#endif
}

inline bool any(IntVec mask) {
#if defined(AFNEXT_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  for (int i = 0; i < kLanes; ++i)
    if (mask[i]) return true;
  return false;
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(float16 x) { return (float)x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void from_float(float* p, float x) { *p = x; }
inline void from_float(float16* p, float x) { *p = (float16)x; }
inline void from_float(bfloat16* p, float x) { store_first(p, splat(x), 1); }

}  // namespace afnext
