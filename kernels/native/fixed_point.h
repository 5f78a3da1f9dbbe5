// Activations as 15-bit integers with one scale, each in two bytes, 128 * high + low, so that products with integer
// weights are exact in int32. Rounding changes x by at most 2^-15 of the largest |x| with the same scale; a bfloat16
// result is itself rounded to 2^-9.

#pragma once

#include "vec.h"

namespace afnext {

struct FixedPoint {
  float scale;
  int32_t total;  // of the codes
};

// codes[i] = x[i] / scale for i < count, a multiple of kLanes.
template <typename T>
inline FixedPoint to_fixed_point(const T* x, int64_t count, int16_t* codes) {
  constexpr int kLargest = 127 * 128 + 63;
  Vec most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = load(x + i), size = v < 0 ? -v : v;
    most = ((size > most) | (size != size)) ? size : most;
  }
  const float scale = largest(most) / kLargest, factor = scale > 0 ? 1 / scale : 0;
  IntVec total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const IntVec code = to_int(round_even(load(x + i) * factor));
    total += code;
    const ShortVec narrowed = narrow(code);
    std::memcpy(codes + i, &narrowed, sizeof narrowed);
  }
  return {scale, sum(total)};
}

// The two bytes of each lane's code.
inline void put_bytes(IntVec codes, int8_t* high, int8_t* low) {
  const IntVec upper = (codes + 64) >> 7;
  const ByteVec bytes[2] = {narrow_to_bytes(upper), narrow_to_bytes(codes - (upper << 7))};
  std::memcpy(high, &bytes[0], sizeof bytes[0]);
  std::memcpy(low, &bytes[1], sizeof bytes[1]);
}

}  // namespace afnext
