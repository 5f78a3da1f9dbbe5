// Rows of an int4 KV cache: see kernels/int4_cache.py.

#pragma once

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace afnext {

constexpr int kMaxHeadDim = 512;  // of a row, which is kept on the stack

// Two codes: channel j in the low half of byte j, channel j + head_dim / 2 in the high half.
struct Int4Pair {
  uint8_t codes;
};

// Sums and differences of lanes `width` apart.
template <int width>
inline Vec butterfly(Vec x) {
  IntVec partner;
  Vec sign;
  for (int i = 0; i < kLanes; ++i) {
    partner[i] = i ^ width;
    sign[i] = i & width ? -1.0f : 1.0f;
  }
#if defined(__clang__)
  Vec other;
  for (int i = 0; i < kLanes; ++i) other[i] = x[i ^ width];
#else
  const Vec other = __builtin_shuffle(x, partner);
#endif
  return other + x * sign;
}

// x = H x, with additions in the same order as in every implementation. count: a power of two, at least 16.
inline void walsh_hadamard(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec row = butterfly<2>(butterfly<1>(load(x + i)));
    if constexpr (kLanes >= 8) row = butterfly<4>(row);
    if constexpr (kLanes >= 16) row = butterfly<8>(row);
    store(x + i, row);
  }
  for (int64_t width = kLanes; width < count; width *= 2)
    for (int64_t first = 0; first < count; first += 2 * width)
      for (int64_t i = first; i < first + width; i += kLanes) {
        const Vec a = load(x + i), b = load(x + i + width);
        store(x + i, a + b);
        store(x + i + width, a - b);
      }
}

// x: a row of count channels without the bias; overwritten.
inline void quantize_int4(float* x, int64_t count, Int4Pair* pairs, float* scale) {
  walsh_hadamard(x, count);
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float step = largest / 8, divisor = step > 0 ? step : 1.0f;
  *scale = step / (float)(2 * count);
  const auto code = [&](float y) { return (int)std::min(std::max(std::floor(y / divisor) + 8.0f, 0.0f), 15.0f); };
  for (int64_t i = 0; i < count / 2; ++i) pairs[i].codes = (uint8_t)(code(x[i]) | code(x[i + count / 2]) << 4);
}

// The values of a row, still transformed: (2 code - 15) * scale.
inline void expand_int4(const Int4Pair* pairs, int64_t count, float scale, float* x) {
  const int64_t half = count / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const IntVec both = (IntVec)widen(load_as<UByteVec>(pairs + i));
    store(x + i, to_float(2 * (both & 15) - 15) * scale);
    store(x + half + i, to_float(2 * (both >> 4) - 15) * scale);
  }
  for (; i < half; ++i) {
    x[i] = (float)(2 * (pairs[i].codes & 15) - 15) * scale;
    x[half + i] = (float)(2 * (pairs[i].codes >> 4) - 15) * scale;
  }
}

}  // namespace afnext
