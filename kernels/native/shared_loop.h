// A loop whose iterations are shared among OpenMP threads, some of which may lose their core to another process.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "memory.h"

namespace afnext {

// Each thread takes chunks of its own contiguous part, so that it reads memory as one stream, and then chunks of the
// parts of others. So a thread without a core delays the others by one chunk at most, not by its whole part.
class SharedLoop {
 public:
  // count: iterations; chunk: how many a thread takes at once; threads: the most that call `run`.
  SharedLoop(int64_t count, int64_t chunk, int64_t threads)
      : count_(count), chunk_(chunk), threads_(threads), parts_(threads) {
    for (int64_t i = 0; i < threads; ++i) new (parts_ + i) Part{{start(i)}};
  }

  // Calls body(first, end) for chunks until none is left; called by each thread of a parallel region.
  template <typename Body>
  void run(Body body) {
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t part = (omp_get_thread_num() + i) % threads_, end = start(part + 1);
      while (true) {
        const int64_t first = parts_[part].next.fetch_add(chunk_, std::memory_order_relaxed);
        if (first >= end) break;
        body(first, std::min(end, first + chunk_));
      }
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<int64_t> next;
  };

  int64_t start(int64_t part) const { return count_ * part / threads_; }

  int64_t count_, chunk_, threads_;
  Scratch<Part> parts_;
};

}  // namespace afnext
