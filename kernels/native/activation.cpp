// SwiGLU, silu(gate) * up.

#include "linear.h"

// gate, up: [rows, columns] of dtype, rows gate_row and up_row apart; out: [rows, columns] contiguous.
AFNEXT_EXPORT void afnext_swiglu(const void* gate, const void* up, void* out, int64_t rows, int64_t columns,
                                 int64_t gate_row, int64_t up_row, int64_t dtype, int64_t threads) {
  using namespace afnext;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t whole = columns / kLanes * kLanes;
    const int rest = (int)(columns - whole);
#pragma omp parallel for num_threads(threads) if (rows * columns > 32768)
    for (int64_t row = 0; row < rows; ++row) {
      const T *g = (const T*)gate + row * gate_row, *u = (const T*)up + row * up_row;
      T* to = (T*)out + row * columns;
      for (int64_t i = 0; i < whole; i += kLanes) store(to + i, silu(load(g + i)) * load(u + i));
      if (rest) store_first(to + whole, silu(load_first(g + whole, rest)) * load_first(u + whole, rest), rest);
    }
  });
}
