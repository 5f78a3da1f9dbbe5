// Where the OpenMP threads of the calling thread run, and how long they wait for it.

#include <omp.h>

#include "common.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
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

// Nanoseconds that the threads, all together, were ready to run but had no CPU, since each of them started. -1 if the
// system does not tell.
AFNEXT_EXPORT int64_t afnext_time_without_cpu(int64_t threads) {
#if defined(__linux__)
  int64_t total = 0, unknown = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, unknown)
  {
    char text[96] = "";  // "time on a CPU, time without, number of turns"
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    const bool read_all = file >= 0 && read(file, text, sizeof text - 1) > 0;
    if (file >= 0) close(file);
    char* rest = text;
    std::strtoll(text, &rest, 10);
    read_all ? total += std::strtoll(rest, nullptr, 10) : ++unknown;
  }
  return unknown ? -1 : total;
#else
  return -1;
#endif
}
