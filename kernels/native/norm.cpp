// LayerNorm and RMSNorm, alone or after adding to the residual stream. Rows are divided among threads; a row stays in
// L1 between the passes over it.

#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "memory.h"

namespace afnext {
namespace {

// The sum of term(load(x + i)) over a row: float32 within blocks and double across them, so that the error, which
// affects all channels of the row, does not grow with the width.
template <typename T, typename Term>
double sum_row(const T* x, int64_t width, Term term) {
  constexpr int64_t kBlock = 32 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = std::min(first + kBlock, width);
    Vec partial[2] = {};
    int64_t i = first;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const TwoVecs two = load_two(x + i);
      partial[0] += term(two.first);
      partial[1] += term(two.second);
    }
    total += sum(partial[0] + partial[1]);
    for (; i < end; ++i) total += term(splat(to_float(x[i])))[0];
  }
  return total;
}

// One row of `width` channels: LayerNorm with `bias`, else RMSNorm. With `residual`, hidden = residual + x in T.
template <typename T>
void norm_row(const T* x, const T* residual, const T* weight, const T* bias, T* normed, T* hidden, int64_t width,
              float eps) {
  if (residual) {
    map(hidden, width, [](Vec a, Vec b) { return a + b; }, x, residual);
    x = hidden;
  }
  const float mean = bias ? (float)(sum_row(x, width, [](Vec v) { return v; }) / width) : 0.0f;
  const double squares = sum_row(x, width, [mean](Vec v) { return (v - mean) * (v - mean); });
  const float factor = (float)(1 / std::sqrt(squares / width + eps));
  if (bias) {
    map(normed, width, [=](Vec v, Vec w, Vec b) { return (v - mean) * factor * w + b; }, x, weight, bias);
  } else {
    map(normed, width, [=](Vec v, Vec w) { return v * factor * w; }, x, weight);
  }
}

}  // namespace
}  // namespace afnext

// x, residual: [rows, width] with rows x_row and residual_row apart; weight, bias: [width]; normed, hidden: [rows, width]
// contiguous. All have `dtype`. residual and hidden, or bias, may be null.
AFNEXT_EXPORT void afnext_norm(const void* x, const void* residual, const void* weight, const void* bias, void* normed,
                               void* hidden, int64_t rows, int64_t width, int64_t x_row, int64_t residual_row,
                               double eps, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (void* written : {normed, hidden})
      if (written) use_large_pages(written, rows * width * sizeof(T));
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t row = 0; row < rows; ++row)
      norm_row((const T*)x + row * x_row, residual ? (const T*)residual + row * residual_row : nullptr,
               (const T*)weight, (const T*)bias, (T*)normed + row * width, hidden ? (T*)hidden + row * width : nullptr,
               width, (float)eps);
  });
}
