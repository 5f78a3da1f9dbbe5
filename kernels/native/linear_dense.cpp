// Products with dense weights, of the activations' dtype: of a few rows the weights are read once, of many they go to panels.
// For levels and dtypes that torch has no fast product for: see kernels/linear.py.

#include "panels.h"

namespace afnext {
namespace {

// y[c, r] = sum_k x[r, k] * weight[c, k] for C outputs and R rows, y `pitch` apart.
template <int C, int R, typename T>
void dot(const T* weight, const float* x, int64_t inner, float* y, int64_t pitch) {
  constexpr int kSums = C * R == 1 ? 4 : C * R <= 4 ? 2 : 1;  // so many additions need not wait for each other
  Vec total[C][R][kSums] = {};
  Ahead ahead(weight, C * inner * sizeof(T));
  const auto add = [&](int64_t k, int s, const auto& part) {
    Vec w[C];
    for (int c = 0; c < C; ++c) w[c] = part(weight + c * inner + k);
    for (int r = 0; r < R; ++r) {
      const Vec v = part(x + r * inner + k);
      for (int c = 0; c < C; ++c) total[c][r][s % kSums] += w[c] * v;
    }
  };
  const auto whole = [](const auto* p) { return load(p); };
  int64_t k = 0;
  for (; k + 4 * kLanes <= inner; k += 4 * kLanes) {
    ahead.read(C * 4 * kLanes * sizeof(T));
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) add(k + s * kLanes, s, whole);
  }
  for (; k + kLanes <= inner; k += kLanes) add(k, 0, whole);
  const int rest = (int)(inner - k);
  if (rest) add(k, 0, [rest](const auto* p) { return load_first(p, rest); });
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      for (int s = 1; s < kSums; ++s) total[c][r][0] += total[c][r][s];
      y[c * pitch + r] = sum(total[c][r][0]);
    }
}

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
  constexpr int64_t kInputs = 2 * kLanes;
  const auto weights = [&](int64_t n, int64_t step, int64_t count, uint8_t* panel) {
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * kInputs, left = inner - k;
        const T* from = weight + (n + i) * inner + k;
        const auto part = [&](int64_t at) {
          return left >= at + kLanes ? load(from + at) : load_first(from + at, (int)std::max<int64_t>(0, left - at));
        };
        store_halves(panel + (s * 32 + i) * 64, part(0), part(kLanes));
      }
  };
  for_panels(x, rows, inner, write.columns, threads, {weight, inner * (int64_t)sizeof(T), kInputs * (int64_t)sizeof(T)},
             weights, write.out, sizeof(T), write);
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
