// What the library tells about itself, and which levels this CPU has.

#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

AFNEXT_EXPORT const char* afnext_fingerprint() { return AFNEXT_FINGERPRINT; }

AFNEXT_EXPORT const char* afnext_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// 1 if this CPU and operating system can run the level's library.
AFNEXT_EXPORT int afnext_supports(const char* level) {
  if (std::strcmp(level, "portable") == 0) return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(level, "avx2") == 0) return avx2;
  if (std::strcmp(level, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
  return 0;
}
