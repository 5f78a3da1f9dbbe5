// Products with int8 weights, weight[n, k] * scales[n], of float rows or of rows rounded to int8 (W8A8).

#include "fixed_point.h"
#include "group_panels.h"
#include "int_dot.h"
#include "linear.h"
#include "quantize_rows.h"

namespace afnext {
namespace {

// `dot` of linear.h for x of -127 .. 127, exactly; sums of up to 2^17 products fit in int32.
template <int C, int R>
void dot_exactly(const int8_t* weight, const int8_t* x, int64_t inner, float* y, int64_t pitch) {
  int64_t k = 0;
#if defined(AFNEXT_PANELS)
  IntVec total[C][R] = {};
  Ahead<C> ahead(weight, C * inner);
  for (; k + kBytes <= inner; k += kBytes) {
    ahead.read(C * kBytes);
    for (int c = 0; c < C; ++c) {
      const SignedBytes w((Bytes)load_bytes(weight + c * inner + k));
      for (int r = 0; r < R; ++r) total[c][r] = w.add_dot(total[c][r], (Bytes)load_bytes(x + r * inner + k));
    }
  }
#endif
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      int32_t whole = 0;
      for (int64_t rest = k; rest < inner; ++rest) whole += (int32_t)weight[c * inner + rest] * x[r * inner + rest];
#if defined(AFNEXT_PANELS)
      whole += sum(total[c][r]);
#endif
      y[c * pitch + r] = (float)whole;
    }
}

#if defined(AFNEXT_BYTE_DOT)

// bfloat16 rows as integers, with one scale per kShared inputs. kWeightOffset is added to the weights, so the sums
// begin with -kWeightOffset times the sums of the row's codes.
class FixedRows {
 public:
  static constexpr int64_t kShared = 4 * kBytes;

  FixedRows(const bfloat16* x, int64_t rows, int64_t inner)
      : inner_(inner),
        groups_((inner + kShared - 1) / kShared),
        bytes_(rows * groups_ * 2 * kShared),
        scales_(rows * groups_),
        begin_(rows * groups_) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t g = 0; g < groups_; ++g) {
        alignas(64) int16_t codes[kShared] = {};
        const int64_t at = row * groups_ + g, first = g * kShared;
        const FixedPoint rounded = to_fixed_point(x + row * inner + first, std::min(kShared, inner - first), codes);
        scales_[at] = rounded.scale;
        begin_[at] = -kWeightOffset * rounded.total;
        for (int64_t i = 0; i < kShared; i += kLanes) {
          int8_t* high = bytes_ + at * 2 * kShared + i;
          put_bytes(widen(load_as<ShortVec>(codes + i)), high, high + kShared);
        }
      }
  }

  int64_t row_bytes() const { return groups_ * 2 * kShared; }

  // y[c, r] = sum_k x[row + r, k] * weight[c, k] for C outputs and R rows, y `pitch` apart.
  template <int C, int R>
  void dot(const int8_t* weight, int64_t row, float* y, int64_t pitch) const {
    Vec total[C][R] = {};
    Ahead<C> ahead(weight, C * inner_);
    for (int64_t g = 0; g < groups_; ++g, weight += kShared) {
      if ((g + 1) * kShared > inner_) {
        add_group<true>(weight, row * groups_ + g, total);
        continue;
      }
      ahead.read(C * kShared);
      add_group<false>(weight, row * groups_ + g, total);
    }
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) y[c * pitch + r] = sum(total[c][r]);
  }

 private:
  template <bool CUT, int C, int R>
  void add_group(const int8_t* weight, int64_t at, Vec (&total)[C][R]) const {
    const int64_t left = inner_ - at % groups_ * kShared;
    IntVec high[C][R], low[C][R];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) high[c][r] = IntVec{}, low[c][r] = IntVec{begin_[at + r * groups_]};
#pragma GCC unroll 4
    for (int64_t k = 0; k < kShared; k += kBytes) {
      UBytes codes[C];
      for (int c = 0; c < C; ++c) {
        const int8_t* from = weight + c * inner_ + k;
        codes[c] =
            (CUT ? load_first_bytes(from, std::min<int64_t>(kBytes, left - k)) : load_bytes(from)) ^ kWeightOffset;
      }
      for (int r = 0; r < R; ++r) {
        const int8_t* bytes = bytes_ + (at + r * groups_) * 2 * kShared + k;
        const Bytes upper = (Bytes)load_bytes(bytes), lower = (Bytes)load_bytes(bytes + kShared);
        for (int c = 0; c < C; ++c) {
          high[c][r] = add_dot(high[c][r], codes[c], upper);
          low[c][r] = add_dot(low[c][r], codes[c], lower);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) total[c][r] += to_float(high[c][r] * 128 + low[c][r]) * scales_[at + r * groups_];
  }

  int64_t inner_, groups_;
  Scratch<int8_t> bytes_;
  Scratch<float> scales_;
  Scratch<int32_t> begin_;
};

#endif

struct Weight {
  const int8_t* codes;  // or null
  const float* scales;
};

// Rows of float or int8, unconverted.
template <typename X>
struct PlainRows {
  const X* x;
  int64_t inner;

  int64_t row_bytes() const { return inner * sizeof(X); }

  template <int C, int R>
  void dot(const int8_t* weight, int64_t row, float* y, int64_t pitch) const {
    if constexpr (std::is_same_v<X, float>) {
      afnext::dot<C, R>(weight, x + row * inner, inner, y, pitch);
    } else {
      dot_exactly<C, R>(weight, x + row * inner, inner, y, pitch);
    }
  }
};

// row_scales: of int8 rows, or null; up: second weight of a SwiGLU pair, or nulls.
template <typename X, typename T>
void product(const X& x, const float* row_scales, const Weight& weight, const Weight& up, const Epilogue<T>& write,
             int64_t rows, int64_t inner, int64_t threads) {
  const int64_t block = kOutputBlock * rows;
  for_outputs(write.columns, rows * write.columns * inner, 2 * block, threads,
              [&](int64_t n, int64_t outputs, float* y) {
                const auto multiply = [&](const Weight& by, float* to) {
                  for_tiles(outputs, rows, x.row_bytes(), [&](auto width, auto height, int64_t i, int64_t row) {
                    x.template dot<decltype(width)::value, decltype(height)::value>(by.codes + (n + i) * inner, row,
                                                                                    to + i * rows + row, rows);
                  });
                  for (int64_t i = 0; i < outputs; ++i)
                    for (int64_t row = 0; row < rows; ++row)
                      to[i * rows + row] *= by.scales[n + i] * (row_scales ? row_scales[row] : 1);
                };
                multiply(weight, y);
                if (up.codes) multiply(up, y + block);
                write(n, outputs, rows, y, up.codes ? y + block : nullptr);
              });
}

#if defined(AFNEXT_PANELS)
// A matrix of weights in their stored layout, multiplied as Element.
template <typename Element>
struct CodeMatrix {
  static constexpr int64_t kInputs = 64 / sizeof(Element);

  const int8_t* codes;
  int64_t inner;

  Rows source() const { return {codes, inner, kInputs}; }

  void write(int64_t n, int64_t outputs, int64_t step, int64_t count, uint8_t* panel, int64_t at) const {
    for (int64_t i = 0; i < outputs; ++i)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * kInputs;
        copy_step<Element>(codes + (n + i) * inner + k, inner - k, panel + (s * 32 + at + i) * 64);
      }
  }
};

// The same, with the outputs' scales as those of a stretch, the group of inputs that shares a scale of 15-bit
// activations.
struct ScaledMatrix : CodeMatrix<int16_t> {
  static constexpr int kGroup = VectorUnit::kSteps * kInputs;

  const float* output_scales;

  ScaledMatrix(const Weight& weight, int64_t inner) : CodeMatrix{weight.codes, inner}, output_scales(weight.scales) {}

  void write(int64_t n, int64_t outputs, int64_t step, int64_t count, uint8_t* panel, int64_t at) const {
    CodeMatrix::write(n, outputs, step, count, panel, at);
    std::copy_n(output_scales + n, outputs, group_scales(panel, 0) + at);
  }
};

// int8 rows times the stored weights, or float rows times the codes as floats, which represent them exactly.
// row_scales: of int8 rows, or null; up: second weight of a SwiGLU pair.
template <typename X, typename T>
void product_in_panels(const X* x, const float* row_scales, const Weight& weight, const Weight& up,
                       const Epilogue<T>& write, int64_t rows, int64_t inner, int64_t threads) {
  using Codes = CodeMatrix<Unit<true>::Element>;
  using Matrix = std::conditional_t<std::is_same_v<X, int8_t>, Codes, NumberMatrix<int8_t>>;
  const Matrix matrices[2] = {{weight.codes, inner}, {up.codes, inner}};
  const auto put = [&](int64_t row, int64_t n, int count, const auto& sums) {
    constexpr int kMatrices = sizeof sums / sizeof sums[0];
    Vec y[kMatrices];
    for (int m = 0; m < kMatrices; ++m) {
      const float* scales = (m ? up : weight).scales + n;
      y[m] = __builtin_convertvector(sums[m], Vec) * (count == kLanes ? load(scales) : load_first(scales, count));
      if constexpr (std::is_same_v<X, int8_t>) y[m] *= row_scales[row];
    }
    write(row, n, count, y);
  };
  for_panels(x, rows, inner, threads, matrices, Outputs(write), put);
}

// bfloat16 rows as 15-bit integers.
template <typename T>
void product_in_fixed_point(const T* x, const Weight& weight, const Weight& up, const Epilogue<T>& write, int64_t rows,
                            int64_t inner, int64_t threads) {
  const TokenGroups<int16_t> tokens(x, rows, inner, ScaledMatrix::kGroup, threads);
  const ScaledMatrix matrices[2] = {{weight, inner}, {up, inner}};
  const GroupUnit<int16_t, ScaledMatrix::kGroup, false> unit(tokens);
  for_panels<Vec>(unit, tokens.codes, rows, inner, threads, matrices, Outputs(write), write);
}
#endif

}  // namespace
}  // namespace afnext

// x: [rows, inner] of dtype, inner a multiple of 16; weight: [columns, inner] int8; scales: [columns] float32; up,
// up_scales: the same of a SwiGLU pair, or null; bias: [columns] float32 or null; residual, null or, and out: [rows,
// columns] of dtype.
AFNEXT_EXPORT void afnext_linear_int8(const void* x, const int8_t* weight, const float* scales, const int8_t* up,
                                      const float* up_scales, const float* bias, const void* residual, void* out,
                                      int64_t rows, int64_t columns, int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up != nullptr};
    const Weight first{weight, scales}, second{up, up_scales};
#if defined(AFNEXT_PANELS)
    if (takes_panels(rows, columns)) {
      if constexpr (kFixedPoint<T>) {
        return product_in_fixed_point((const T*)x, first, second, write, rows, inner, threads);
      } else if constexpr (kPanelsTake<T>) {
        return product_in_panels((const T*)x, nullptr, first, second, write, rows, inner, threads);
      }
    }
#endif
#if defined(AFNEXT_BYTE_DOT)
    if constexpr (std::is_same<T, bfloat16>::value)
      return product(FixedRows((const T*)x, rows, inner), nullptr, first, second, write, rows, inner, threads);
#endif
    Scratch<float> wide(rows * inner);
    to_floats((const T*)x, wide, rows * inner);
    product(PlainRows<float>{wide, inner}, nullptr, first, second, write, rows, inner, threads);
  });
}

// As afnext_linear_int8, with the rows rounded to int8 first.
AFNEXT_EXPORT void afnext_linear_w8a8(const void* x, const int8_t* weight, const float* scales, const int8_t* up,
                                      const float* up_scales, const float* bias, const void* residual, void* out,
                                      int64_t rows, int64_t columns, int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const QuantizedRows by((const T*)x, rows, inner, threads);
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns, up != nullptr};
    const Weight first{weight, scales}, second{up, up_scales};
#if defined(AFNEXT_PANELS)
    if (takes_panels(rows, columns))
      return product_in_panels(by.codes, by.scales, first, second, write, rows, inner, threads);
#endif
    product(PlainRows<int8_t>{by.codes, inner}, by.scales, first, second, write, rows, inner, threads);
  });
}

// Dequantizes the weights, [columns, inner] of dtype: scales * weight, rounded once.
AFNEXT_EXPORT void afnext_unpack_int8(const int8_t* weight, const float* scales, void* out, int64_t columns,
                                      int64_t inner, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_outputs(columns, columns * inner, 0, threads, [&](int64_t first, int64_t outputs, float*) {
      for (int64_t n = first; n < first + outputs; ++n)
        for (int64_t k = n * inner; k < (n + 1) * inner; k += kLanes) store((T*)out + k, load(weight + k) * scales[n]);
    });
  });
}
