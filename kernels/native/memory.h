// Memory of a call, of a thread, and of outputs.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>

namespace afnext {

constexpr uintptr_t kLargePage = 2 << 20;

// Aligned memory for one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_((T*)std::aligned_alloc(64, ((size_t)count * sizeof(T) + 127) / 64 * 64)) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Memory of the calling thread, reused by its next call with the same Use: the system clears new memory, which for the
// packed operands of a product of many rows takes as long as packing. In 2 MB pages if the system has them, which
// avoids TLB misses in AMX tile loads.
template <typename Use>
uint8_t* kept_memory(int64_t bytes) {
  struct Memory {
    uint8_t* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if ((size_t)bytes > memory.size) {
    std::free(memory.data);
    memory.size = ((size_t)bytes + kLargePage - 1) / kLargePage * kLargePage;
    memory.data = (uint8_t*)std::aligned_alloc(kLargePage, memory.size);
#if defined(__linux__)
    madvise(memory.data, memory.size, MADV_HUGEPAGE);
#endif
  }
  return memory.data;
}

// Call before writing an output. A large output is often, and one of 32 MB or more always, memory that malloc has just
// mapped. In 4 KB pages, the system takes longer to clear and map it than the kernel takes to fill it. 2 MB pages, if
// the system has them, take a quarter of that.
inline void use_large_pages(void* out, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t first = ((uintptr_t)out + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = ((uintptr_t)out + bytes) / kLargePage * kLargePage;
  if (bytes >= 4 << 20) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace afnext
