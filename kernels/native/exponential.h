// 2 to the power of each lane, and functions that use it.

#pragma once

#include "vec.h"

namespace afnext {

// To float32's precision, for |x| <= 126: a polynomial on [-1/2, 1/2] that is exactly 1 at 0 (a minimax fit by weighted
// least squares with a largest relative error of 2e-9), times a power of two.
inline Vec exp2_bounded(Vec x) {
  const Vec whole = round_even(x);
  const Vec r = x - whole;
  Vec p = splat(1.5353361959569156e-4f);
  p = p * r + 1.3398873852565885e-3f;
  p = p * r + 9.61843691766262e-3f;
  p = p * r + 5.5503323674201965e-2f;
  p = p * r + 2.4022647738456726e-1f;
  p = p * r + 6.931471824645996e-1f;
  p = p * r + 1.0f;
  return (Vec)((IntVec)p + (to_int(whole) << 23));
}

// The same for x <= 0. Below 2^-126, zero.
inline Vec exp2(Vec x) {
  const Vec least = splat(-126.0f);
  return x >= least ? exp2_bounded(x > least ? x : least) : Vec{};
}

// To 1e-4, which is enough for results rounded to bfloat16 (4e-3), for x <= 0. Below 2^-126, zero.
inline Vec exp2_coarse(Vec x) {
  const auto polynomial = [](Vec r) {
    Vec p = splat(7.802452147006989e-2f);
    p = p * r + 2.2606715559959412e-1f;
    p = p * r + 6.958335638046265e-1f;
    return p * r + 9.999251961708069e-1f;
  };
#if defined(__AVX512F__)
  // scalef multiplies by 2 to the power of the floor of x. Subnormal results would cost Intel's CPUs hundreds of cycles each.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  const __m512 r = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)polynomial((Vec)r), (__m512)x);
#else
  const Vec least = splat(-126.0f), bounded = x > least ? x : least, floor = round_even(bounded - 0.5f);
  const Vec scaled = (Vec)((IntVec)polynomial(bounded - floor) + (to_int(floor) << 23));
  return x >= least ? scaled : Vec{};
#endif
}

// x / (1 + exp(-x)). Where the exponent is clamped, the result is x or, to 1e-34, 0.
inline Vec silu(Vec x) {
  const Vec least = splat(-126.0f), most = splat(126.0f);
  Vec power = x * -1.44269504f;
  power = power > least ? power : least;
  power = power < most ? power : most;
  return x / (1 + exp2_bounded(power));
}

}  // namespace afnext
