// Products with dense weights, of the activations' dtype: of a few rows the weights are read once, of many they go to panels.
// For levels and dtypes that torch has no fast product for: see kernels/linear.py.

#include "panels.h"

namespace afnext {
namespace {

template <typename T>
void product_of_few(const T* x, const T* weight, const Epilogue<T>& write, int64_t rows, int64_t inner, int64_t threads) {
  Scratch<float> wide(rows * inner);
  to_floats(x, wide, rows * inner);
  const float* activations = wide;
  for_outputs(write.columns, rows * write.columns * inner, kOutputBlock * rows, threads,
              [&](int64_t n, int64_t outputs, float* y) {
                for_tiles(outputs, rows, [&](auto width, auto height, int64_t i, int64_t row) {
                  dot<decltype(width)::value, decltype(height)::value>(weight + (n + i) * inner, activations + row * inner,
                                                                       inner, y + i * rows + row, rows);
                });
                write(n, outputs, rows, y, nullptr);
              });
}

#if defined(__AVX2__)
template <typename T>
void product_in_panels(const T* x, const T* weight, const Epilogue<T>& write, int64_t rows, int64_t inner,
                       int64_t threads) {
  for_panels(x, rows, inner, write.columns, threads, {weight, inner * (int64_t)sizeof(T), 2 * kLanes * (int64_t)sizeof(T)},
             numbers_in_panels(weight, inner), write.out, sizeof(T), write);
}
#endif

}  // namespace
}  // namespace afnext

// x: [rows, inner]; weight: [columns, inner]; out: [rows, columns]; all of dtype. bias: [columns] float32 or null.
AFNEXT_EXPORT void afnext_linear(const void* x, const void* weight, const float* bias, void* out, int64_t rows,
                                 int64_t columns, int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> write{bias, nullptr, (T*)out, columns};
#if defined(__AVX2__)
    if constexpr (kPanelsTake<T>)
      if (takes_panels(rows, columns)) return product_in_panels((const T*)x, (const T*)weight, write, rows, inner, threads);
#endif
    product_of_few((const T*)x, (const T*)weight, write, rows, inner, threads);
  });
}
