// Where the OpenMP threads of the calling thread run.

#include <omp.h>

#include "common.h"

#if defined(__linux__)
#include <sched.h>
#endif

// Moves each of the threads to one of the sets of CPUs, and lets the system move it again among `allowed`: thread i to
// sets[(first + i) % threads], where `first` is a set with the CPU that the caller runs on, so that the caller stays.
// sets: [threads, bytes]; allowed: [bytes]; bit j of byte i stands for CPU 8 * i + j; bytes: a multiple of 8. Returns
// how often the system refused, which is never 0 except on Linux.
AFNEXT_EXPORT int64_t afnext_spread_threads(const uint8_t* sets, const uint8_t* allowed, int64_t bytes,
                                            int64_t threads) {
#if defined(__linux__)
  const int64_t here = sched_getcpu();
  int64_t first = 0, refused = 0;
  for (int64_t i = 0; i < threads; ++i)
    if (here >= 0 && here < 8 * bytes && (sets[i * bytes + here / 8] >> here % 8 & 1)) first = i;
#pragma omp parallel num_threads(threads) reduction(+ : refused)
  {
    const uint8_t* set = sets + (first + omp_get_thread_num()) % threads * bytes;
    refused += sched_setaffinity(0, bytes, (const cpu_set_t*)set) != 0;
    refused += sched_setaffinity(0, bytes, (const cpu_set_t*)allowed) != 0;
  }
  return refused;
#else
  return threads;
#endif
}
