// Products with dense weights in the activations' dtype: few rows read the weights once, many rows use panels.
// For levels and dtypes without a fast product in torch, and for pairs: see kernels/linear.py.

#include "panels.h"

namespace afnext {
namespace {

// up: second weight of a SwiGLU pair, or null.
template <typename T>
void product_of_few(const T* x, const T* weight, const T* up, const Epilogue<T>& write, int64_t rows, int64_t inner,
                    int64_t threads) {
  Scratch<float> wide(rows * inner);
  to_floats(x, wide, rows * inner);
  const float* activations = wide;
  const int64_t block = kOutputBlock * rows;
  for_outputs(write.columns, rows * write.columns * inner, 2 * block, threads,
              [&](int64_t n, int64_t outputs, float* y) {
                const auto multiply = [&](const T* by, float* to) {
                  for_tiles(outputs, rows, inner * (int64_t)sizeof(float),
                            [&](auto width, auto height, int64_t i, int64_t row) {
                              dot<decltype(width)::value, decltype(height)::value>(
                                  by + (n + i) * inner, activations + row * inner, inner, to + i * rows + row, rows);
                            });
                };
                multiply(weight, y);
                if (up) multiply(up, y + block);
                write(n, outputs, rows, y, up ? y + block : nullptr);
              });
}

}  // namespace
}  // namespace afnext

// x: [rows, inner]; weight, up: [columns, inner], up of a SwiGLU pair, or null; out: [rows, columns]; all of dtype. bias:
// [columns] float32 or null.
AFNEXT_EXPORT void afnext_linear(const void* x, const void* weight, const void* up, const float* bias, void* out,
                                 int64_t rows, int64_t columns, int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> write{bias, nullptr, (T*)out, columns, up != nullptr};
#if defined(AFNEXT_PANELS)
    if constexpr (kPanelsTake<T>)
      if (takes_panels(rows, columns)) {
        const NumberMatrix<T> matrices[2] = {{(const T*)weight, inner}, {(const T*)up, inner}};
        return for_panels((const T*)x, rows, inner, threads, matrices, Outputs(write), write);
      }
#endif
    product_of_few((const T*)x, (const T*)weight, (const T*)up, write, rows, inner, threads);
  });
}
