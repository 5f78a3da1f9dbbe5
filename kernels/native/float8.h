// The 8-bit float e4m3: see kernels/e4m3.py.

#pragma once

#include <cmath>

#include "vec.h"

namespace afnext {

struct float8 {
  uint8_t bits;
};

inline Vec load(const float8* p) {
#if defined(__AVX512F__)
  const ShortVec wide = (ShortVec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const ShortVec wide = (ShortVec)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
#elif defined(AFNEXT_NEON)
  const ShortVec wide = (ShortVec)vget_low_s16(vmovl_s8(vcreate_s8(load_as<uint32_t>(p))));
#else
  const ShortVec wide = __builtin_convertvector(load_as<ByteVec>(p), ShortVec);
#endif
  // As float16, whose exponent has a bias of 15 instead of 7. Subnormal numbers have the same layout.
  return widen_float16((HalfVec)(wide << 7) & 0xBF80) * 256.0f;
}

// x, which is within +-448, to the nearest, ties to even.
inline uint8_t float8_bits(float x) {
  const auto bits_of = [](float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    return bits;
  };
  const float size = std::fabs(x);
  // Half of the 20 bits that are cut off, less one unless what is kept is odd; then 127 - 7 off the exponent.
  const uint32_t normal = ((bits_of(size) + 0x7FFFF + (bits_of(size) >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = bits_of(size + 16384.0f) - bits_of(16384.0f);  // rounded to multiples of 2^-9
  return (uint8_t)((size < 0.015625f ? subnormal : normal) | (bits_of(x) >> 24 & 0x80));
}

}  // namespace afnext
