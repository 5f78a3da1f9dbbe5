// Products of few rows with int8 weights in groups, scales[n, k / group] * (weight[n, k] - zeros[n, k / group]). The
// weights become float32 in registers.

#include "linear.h"

namespace afnext {
namespace {

// Codes [columns, inner] with scales and zeros, or null, [columns, inner / group] of S.
template <typename S>
struct Grouped {
  const int8_t* codes;  // or null
  const S* scales;
  const S* zeros;
  int64_t inner, group;

  // The scale and zero of group g of all groups.
  float scale(int64_t g) const { return to_float(scales[g]); }
  float zero(int64_t g) const { return zeros ? to_float(zeros[g]) : 0; }
};

// y[c, r] = sum_k x[r, k] * weight[n + c, k] for C outputs from n and R rows, y `pitch` apart.
template <int C, int R, typename S>
void dot_groups(const Grouped<S>& weight, int64_t n, const float* x, float* y, int64_t pitch) {
  const int64_t inner = weight.inner, group = weight.group, groups = inner / group;
  Vec total[C][R] = {};
  const int8_t* codes = weight.codes + n * inner;
  Ahead<C> ahead(codes, C * inner);
  for (int64_t g = 0; g < groups; ++g) {
    float scale[C], zero[C];
    for (int c = 0; c < C; ++c) {
      const int64_t at = (n + c) * groups + g;
      scale[c] = weight.scale(at), zero[c] = weight.zero(at);
    }
    if (g % 4 == 0) ahead.read((int)(C * 4 * group));
    for (int64_t k = g * group; k < (g + 1) * group; k += kLanes) {
      Vec w[C];
      for (int c = 0; c < C; ++c) w[c] = (load(codes + c * inner + k) - zero[c]) * scale[c];
      for (int r = 0; r < R; ++r) {
        const Vec v = load(x + r * inner + k);
        for (int c = 0; c < C; ++c) total[c][r] += w[c] * v;
      }
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) y[c * pitch + r] = sum(total[c][r]);
}

}  // namespace
}  // namespace afnext

// x: [rows, inner] of dtype; weight, up: [columns, inner] int8; scales, zeros: [columns, inner / group] of group_dtype,
// zeros null where all are 0; up: of a SwiGLU pair, or null; bias: [columns] float32 or null; residual, null or, and out:
// [rows, columns] of dtype.
AFNEXT_EXPORT void afnext_linear_int8_groups(const void* x, const int8_t* weight, const void* scales, const void* zeros,
                                             const int8_t* up, const void* up_scales, const void* up_zeros,
                                             const float* bias, const void* residual, void* out, int64_t rows,
                                             int64_t columns, int64_t inner, int64_t group, int64_t group_dtype,
                                             int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(group_dtype, [&](auto kind) {
    using S = decltype(kind);
    const Grouped<S> first{weight, (const S*)scales, (const S*)zeros, inner, group};
    const Grouped<S> second{up, (const S*)up_scales, (const S*)up_zeros, inner, group};
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      Scratch<float> wide(rows * inner);
      to_floats((const T*)x, wide, rows * inner);
      const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up != nullptr};
      const int64_t block = kOutputBlock * rows;
      for_outputs(columns, rows * columns * inner, 2 * block, threads, [&](int64_t n, int64_t outputs, float* y) {
        const auto multiply = [&](const Grouped<S>& by, float* to) {
          for_tiles(outputs, rows, inner * sizeof(float), [&](auto width, auto height, int64_t i, int64_t row) {
            dot_groups<decltype(width)::value, decltype(height)::value>(by, n + i, wide + row * inner,
                                                                        to + i * rows + row, rows);
          });
        };
        multiply(first, y);
        if (up) multiply(second, y + block);
        write(n, outputs, rows, y, up ? y + block : nullptr);
      });
    });
  });
}

// Dequantizes the weights, [columns, inner] of dtype: scales * (weight - zeros), rounded once.
AFNEXT_EXPORT void afnext_unpack_int8_groups(const int8_t* weight, const void* scales, const void* zeros, void* out,
                                             int64_t columns, int64_t inner, int64_t group, int64_t group_dtype,
                                             int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(group_dtype, [&](auto kind) {
    using S = decltype(kind);
    const Grouped<S> by{weight, (const S*)scales, (const S*)zeros, inner, group};
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      for_outputs(columns, columns * inner, 0, threads, [&](int64_t first, int64_t outputs, float*) {
        for (int64_t g = first * inner / group; g < (first + outputs) * inner / group; ++g)
          for (int64_t k = g * group; k < (g + 1) * group; k += kLanes)
            store((T*)out + k, (load(weight + k) - by.zero(g)) * by.scale(g));
      });
    });
  });
}
