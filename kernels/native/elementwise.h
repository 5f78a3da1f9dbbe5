// Elementwise functions over arrays.

#pragma once

#include <type_traits>

#include "vec.h"

namespace afnext {

// 2 * kLanes neighbouring elements, in an order that load_two and store_two share. For bfloat16 these are the even and
// the odd elements, which takes two operations on whole registers; widening each half takes shuffles and three times as
// long.
struct TwoVecs {
  Vec first, second;
};

template <typename T>
inline TwoVecs load_two(const T* p) {
  return {load(p), load(p + kLanes)};
}

inline TwoVecs load_two(const bfloat16* p) {
  BitVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return {(Vec)(bits << 16), (Vec)(bits & 0xFFFF0000)};
}

template <typename T>
inline void store_two(T* p, TwoVecs x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}

inline void store_two(bfloat16* p, TwoVecs x) {
  const BitVec bits = rounded_to_bfloat16(x.first) >> 16 | (rounded_to_bfloat16(x.second) & 0xFFFF0000);
  std::memcpy(p, &bits, sizeof bits);
}

#if defined(AFNEXT_PANELS)
// Float32 sums of channels loaded from T by load_two, in their original order.
template <typename T>
inline void store_sums(float* p, TwoVecs x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(AFNEXT_NEON)
    const float32x4_t even = (float32x4_t)x.first, odd = (float32x4_t)x.second;
    x = {(Vec)vzip1q_f32(even, odd), (Vec)vzip2q_f32(even, odd)};
#elif defined(__AVX512F__)
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i last = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    const __m512 even = (__m512)x.first, odd = (__m512)x.second;
    x = {(Vec)_mm512_permutex2var_ps(even, first, odd), (Vec)_mm512_permutex2var_ps(even, last, odd)};
#else
    const __m256 low = _mm256_unpacklo_ps((__m256)x.first, (__m256)x.second);
    const __m256 high = _mm256_unpackhi_ps((__m256)x.first, (__m256)x.second);
    x = {(Vec)_mm256_permute2f128_ps(low, high, 0x20), (Vec)_mm256_permute2f128_ps(low, high, 0x31)};
#endif
  }
  store(p, x.first);
  store(p + kLanes, x.second);
}
#endif

// out[i] = function(x[i], ...) for i < count.
template <typename T, typename Function, typename... Input>
inline void map(T* out, int64_t count, Function function, const Input*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    store_two(out + i, {function(load_two(x + i).first...), function(load_two(x + i).second...)});
  for (; i + kLanes <= count; i += kLanes) store(out + i, function(load(x + i)...));
  if (i < count) store_first(out + i, function(load_first(x + i, (int)(count - i))...), (int)(count - i));
}

}  // namespace afnext
