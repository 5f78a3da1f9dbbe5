// int3 weights: int4 codes that are all even, 0, 2 .. 14, of which 128 inputs are stored in 48 bytes instead of 64.
//
// The lowest bit of an even code is spare. Stored are the first three quarters of the 64 bytes; byte i of each quarter has,
// in the lowest bits of its two codes, one bit of the two codes of byte i of the last quarter: the first quarter has their
// bits 1, the second their bits 2, the third their bits 3. Unpacking takes about 11 instructions on vectors of 16 bytes.

#pragma once

#include "linear_4bit.h"

namespace afnext {

struct EvenNibbles {
  static constexpr int kVectors = 16 / kLanes;
  static constexpr int kBytes = 48;
  static constexpr int64_t stored(int64_t inputs) { return inputs / 8 * 3; }

  static void load_block(const uint8_t* p, int64_t, BitVec (&words)[kVectors]) {
    const auto x = load_as<Quarter>(p), y = load_as<Quarter>(p + 16), z = load_as<Quarter>(p + 32);
    const Quarter last = last_of(x, y, z);
#if defined(__AVX512F__)
    const __m512i stored = _mm512_maskz_loadu_epi32(0x0FFF, p);
    words[0] = (BitVec)_mm512_inserti32x4(stored & _mm512_set1_epi32(kEven), (__m128i)last, 3);
#elif defined(__AVX2__)
    words[0] = load_as<BitVec>(p) & kEven;
    words[1] = (BitVec)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)(z & kEven)), (__m128i)last, 1);
#else
    words[0] = x & kEven, words[1] = y & kEven, words[2] = z & kEven, words[3] = last;
#endif
  }

  // Two codes per byte from input `first` of the matrix on. space: for `count` inputs and 128 more.
  static const uint8_t* codes(const uint8_t* stored, int64_t first, int64_t count, uint8_t* space) {
    const int64_t begin = first / 128, end = (first + count + 127) / 128;
    for (int64_t block = begin; block < end; ++block) {
      BitVec words[kVectors];
      load_block(stored + block * kBytes, kBytes, words);
      std::memcpy(space + (block - begin) * 64, words, sizeof words);
    }
    return space + first % 128 / 2;
  }

 private:
  typedef uint32_t Quarter __attribute__((vector_size(16)));
  static constexpr uint32_t kEven = 0xEEEEEEEE, kSpare = 0x11111111;

  static Quarter last_of(Quarter x, Quarter y, Quarter z) {
    return (x & kSpare) << 1 | (y & kSpare) << 2 | (z & kSpare) << 3;
  }
};

}  // namespace afnext
