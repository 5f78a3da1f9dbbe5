// Information about the library, and the levels that this CPU supports.

#include <algorithm>
#include <chrono>

#include "vec.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(__x86_64__)
// Whether the CPU has dot products of bytes in 32-byte vectors, with or without AVX-512.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
}

// Whether the CPU has AMX for bfloat16 and int8, and the system lets this process use it. On Linux a process must ask.
bool may_use_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (bf16 | tile | int8)) != (bf16 | tile | int8))
    return false;
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
enum class Extension { kDotProd, kI8MM, kBF16 };

// Whether the CPU has an extension of the instruction set, according to the system.
bool has(Extension extension) {
#if defined(__linux__)
  constexpr unsigned long dot_product = 1ul << 20, i8mm = 1ul << 13, bf16 = 1ul << 14;
  switch (extension) {
    case Extension::kDotProd: return getauxval(AT_HWCAP) & dot_product;
    case Extension::kI8MM: return getauxval(AT_HWCAP2) & i8mm;
    case Extension::kBF16: return getauxval(AT_HWCAP2) & bf16;
  }
#elif defined(__APPLE__)
  const char* const names[] = {"hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM",
                               "hw.optional.arm.FEAT_BF16"};
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(names[(int)extension], &value, &size, nullptr, 0) == 0 && value;
#endif
  return false;
}
#endif

#if defined(__AVX512BF16__)
// Seconds for 16 * 64 calls of add(sum): the best of many runs, so that other processes on the core do not count.
template <typename Add>
double fastest(Add add) {
  double best = 1;
  for (int run = 0; run < 100; ++run) {
    __m512 sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 64; ++i) {
#pragma GCC unroll 16
      for (auto& sum : sums) {
        sum = add(sum);
        asm volatile("" : "+v"(sum));
      }
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}
#endif

}  // namespace

#if defined(__AVX512BF16__)
// 1 if this CPU multiplies bfloat16 faster than float32, of which an instruction takes half as many elements. Zen 4 and
// 5 are twice as fast. On Sapphire and Emerald Rapids, where AMX is meant for it, an instruction takes four times as
// long.
AFNEXT_EXPORT int afnext_multiplies_bfloat16_faster() {
  const __m512 zeros = _mm512_setzero_ps();
  const double pairs = fastest([&](__m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)zeros, (__m512bh)zeros); });
  const double floats = fastest([&](__m512 sum) { return _mm512_fmadd_ps(zeros, zeros, sum); });
  return pairs < 2 * floats;
}
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
  if (std::strcmp(level, "avxvnni") == 0) return avx2 && has_avx_vnni();
  const bool avx512vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(level, "avx512vnni") == 0) return avx512vnni;
  const bool avx512 = avx512vnni && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(level, "avx512") == 0) return avx512;
  if (std::strcmp(level, "amx") == 0) return avx512 && may_use_amx();
#elif defined(__aarch64__)
  if (std::strcmp(level, "neon") == 0) return 1;
  const bool dot_product = has(Extension::kDotProd);
  if (std::strcmp(level, "neondot") == 0) return dot_product;
  if (std::strcmp(level, "i8mm") == 0) return dot_product && has(Extension::kI8MM) && has(Extension::kBF16);
#endif
  return 0;
}
