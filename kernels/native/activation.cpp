// GELU, x * Phi(x) with the normal distribution Phi, and SwiGLU, silu(gate) * up.

#include <algorithm>

#include "elementwise.h"
#include "exponential.h"
#include "memory.h"

namespace afnext {
namespace {

// Phi(x) - 1/2 is odd: x times a rational function of x^2, a minimax fit by weighted least squares with a largest error
// of 7e-9 for |x| < 5.5. Beyond, Phi is 0 or 1 to 2e-8, half of the spacing of float32 below 1.
inline Vec gelu(Vec x) {
  constexpr float kFar = 5.5f;
  const Vec s = x * x;
  Vec p = splat(2.274943026390762e-8f);
  p = p * s + 6.35212241907239e-6f;
  p = p * s + 1.6882569769315864e-4f;
  p = p * s + 4.677260652740264e-3f;
  p = p * s + 3.385264394344415e-2f;
  p = p * s + 3.9894223462443446e-1f;
  Vec q = splat(1.1975062074982145e-6f);
  q = q * s + 7.364753645968009e-5f;
  q = q * s + 1.8844448431601742e-3f;
  q = q * s + 2.86458705900279e-2f;
  q = q * s + 2.5152191282914727e-1f;
  q = q * s + 1.0f;
  const Vec near = x * (x * p / q) + x * 0.5f;
  return s >= kFar * kFar ? (x > 0 ? x : Vec{}) : near;
}

}  // namespace
}  // namespace afnext

// x, out: `count` elements of dtype.
AFNEXT_EXPORT void afnext_gelu(const void* x, void* out, int64_t count, int64_t dtype, int64_t threads) {
  using namespace afnext;
  constexpr int64_t kBlock = 4096;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    use_large_pages(out, count * sizeof(T));
#pragma omp parallel for num_threads(threads) if (count > 32768)
    for (int64_t first = 0; first < count; first += kBlock)
      map((T*)out + first, std::min(kBlock, count - first), gelu, (const T*)x + first);
  });
}

// gate, up: [rows, columns] of dtype, rows gate_row and up_row apart; out: [rows, columns] contiguous.
AFNEXT_EXPORT void afnext_swiglu(const void* gate, const void* up, void* out, int64_t rows, int64_t columns,
                                 int64_t gate_row, int64_t up_row, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    use_large_pages(out, rows * columns * sizeof(T));
#pragma omp parallel for num_threads(threads) if (rows * columns > 32768)
    for (int64_t row = 0; row < rows; ++row)
      map((T*)out + row * columns, columns, [](Vec g, Vec u) { return silu(g) * u; }, (const T*)gate + row * gate_row,
          (const T*)up + row * up_row);
  });
}
