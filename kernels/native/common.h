// The C interface and the element types of all native kernels.
//
// A function `afnext_<name>` is called from Python by `native.call("<name>", ...)`, which passes
//   a tensor as a pointer to its first element (None as a null pointer), an int or bool as int64_t, a float as double,
//   a torch.dtype as an int64_t of DType, and last the number of threads as an int64_t.
// The function allocates no tensors: outputs and workspaces belong to the caller. Strides are in elements.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define AFNEXT_EXPORT extern "C" __attribute__((visibility("default")))
// For the body of a hot loop: a call would spill the loop's vectors to the stack.
#define AFNEXT_ALWAYS_INLINE __attribute__((always_inline))

namespace afnext {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bfloat16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using float16 = __fp16;  // gcc has _Float16 in C++ from version 13 on
#else
using float16 = _Float16;
#endif

// Calls `function` with a value of the C++ type of `dtype`: with_dtype(dtype, [&](auto zero) { using T = ...; }).
template <typename Function>
inline void with_dtype(int64_t dtype, Function&& function) {
  switch (dtype) {
    case kFloat32: return function(float{});
    case kBFloat16: return function(bfloat16{});
    case kFloat16: return function(float16{});
  }
}

}  // namespace afnext
