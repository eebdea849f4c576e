// Vector instruction sets of the CPU. Explicit targets instead of target_clones, whose AVX2 has no fused multiply-add,
// whose AVX-512 has neither 16-bit instructions nor a preferred width of 512, and whose choice nothing limits.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define DPH_X86 1
#define DPH_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)  // would ignore the whole attribute because of the preferred width
#define DPH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define DPH_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#endif

namespace dph {

// Vector width in floats that the environment variable DPH_CPU_CAPABILITY permits at most. Read once;
// dph_kernels/native.py raises for a value that is not one of these.
inline int permitted_floats() {
  static const int floats = [] {
    const char* const name = getenv("DPH_CPU_CAPABILITY");
    if (name && !strcmp(name, "baseline")) return 4;
    return name && !strcmp(name, "avx2") ? 8 : 16;
  }();
  return floats;
}

// Vector width in floats, at most ``most``: 16 if the CPU supports DPH_AVX512, 8 if it supports DPH_AVX2, else 4 (the
// baseline).
inline int vector_floats(int most = 16) {
#ifdef DPH_X86
  if (most > permitted_floats()) most = permitted_floats();
  if (most >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return 16;
  }
  if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

}  // namespace dph
