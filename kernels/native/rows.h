// Rows of a head's channels: conversion to another element type, and rotation.

#pragma once

#include <type_traits>

#include "vec.h"

namespace afnext {

// to[i] = from[i] * scale for i < count.
template <typename To, typename From>
inline void convert(const From* from, int64_t count, float scale, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * scale);
  if (i < count) store_first(to + i, load_first(from + i, count - i) * scale, count - i);
}

// Rotates `pairs` channel pairs of one row: (j, j + pairs) if `half`, else (2j, 2j + 1).
inline void rotate(float* x, const float* cos, const float* sin, int64_t pairs, bool half) {
  if (half) {
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[j], b = x[j + pairs];
      x[j] = a * cos[j] - b * sin[j];
      x[j + pairs] = b * cos[j] + a * sin[j];
    }
  } else {
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      x[2 * j] = a * cos[j] - b * sin[j];
      x[2 * j + 1] = b * cos[j] + a * sin[j];
    }
  }
}

}  // namespace afnext
