// Rounding of rows to int8: see quantize_rows.h.

#include "quantize_rows.h"

// x: [rows, width] of dtype; codes: [rows, width] int8; scales: [rows] float32.
AFNEXT_EXPORT void afnext_quantize_rows(const void* x, int8_t* codes, float* scales, int64_t rows, int64_t width,
                                        int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    use_large_pages(codes, rows * width);
    quantize_rows((const T*)x, codes, scales, rows, width, threads);
  });
}
