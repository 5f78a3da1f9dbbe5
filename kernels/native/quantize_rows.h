// Rows of floats as int8, codes * scale: see kernels/quantize_rows.py.

#pragma once

#include "memory.h"
#include "vec.h"

namespace afnext {

template <typename T>
inline void quantize_row(const T* x, int8_t* codes, float* scale, int64_t width) {
  const int64_t whole = width / kLanes * kLanes, unrolled = width / (4 * kLanes) * 4 * kLanes;
  const int rest = (int)(width - whole);
  IntVec most[4] = {};
  const auto see = [&](Vec v, int part) {
    const IntVec size = (IntVec)v & INT32_MAX;  // magnitudes compare like their bits, NaN as the largest
    most[part] = size > most[part] ? size : most[part];
  };
  for (int64_t i = 0; i < unrolled; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) see(load(x + i + part * kLanes), part);
  for (int64_t i = unrolled; i < whole; i += kLanes) see(load(x + i), 0);
  if (rest) see(load_first(x + whole, rest), 0);
  for (int part = 1; part < 4; ++part) see((Vec)most[part], 0);
  *scale = largest((Vec)most[0]) / 127;
  const float divisor = *scale > 0 ? *scale : 1;
#if defined(AFNEXT_PANELS)
  // A quotient corrected by its remainder is rounded like a division (Markstein 1990), which takes four times as long.
  const float inverse = 1 / divisor;
  const bool exact = divisor > 1e-30f && divisor < 1e30f;  // nothing under- or overflows
  const auto divided = [&](Vec v) {
    const Vec quotient = v * inverse, remainder = fused(-quotient, splat(divisor), v);
    return exact ? fused(remainder, splat(inverse), quotient) : v / divisor;
  };
#else
  const auto divided = [&](Vec v) { return v / divisor; };
#endif
  const auto round = [&](Vec v) {
    v = round_even(divided(v));
    v = v > 127 ? splat(127) : v < -127 ? splat(-127) : v;
    return narrow_to_bytes(to_int(v));
  };
  for (int64_t i = 0; i < whole; i += kLanes) {
    const ByteVec bytes = round(load(x + i));
    std::memcpy(codes + i, &bytes, sizeof bytes);
  }
  if (rest) {
    const ByteVec bytes = round(load_first(x + whole, rest));
    std::memcpy(codes + whole, &bytes, rest);
  }
}

// codes: [rows, width]; scales: [rows].
template <typename T>
inline void quantize_rows(const T* x, int8_t* codes, float* scales, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
  for (int64_t row = 0; row < rows; ++row) quantize_row(x + row * width, codes + row * width, scales + row, width);
}

// The operands of a product, valid until the next product on this thread.
struct QuantizedRows {
  int8_t* codes;
  float* scales;

  template <typename T>
  QuantizedRows(const T* x, int64_t rows, int64_t width, int64_t threads) {
    const int64_t size = (rows * width + 63) / 64 * 64;
    codes = (int8_t*)kept_memory<QuantizedRows>(size + rows * (int64_t)sizeof(float));
    scales = (float*)(codes + size);
    quantize_rows(x, codes, scales, rows, width, threads);
  }
};

}  // namespace afnext
