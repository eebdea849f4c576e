// Which vectors the processor has. Not by target_clones (common.h) where it matters: its AVX2 has no fused multiply-add,
// and its AVX-512 neither the instructions for 16-bit numbers nor the leave to use the whole width.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define DPH_X86 1
#define DPH_AVX2 __attribute__((target("avx2,fma")))
#define DPH_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

namespace dph {

// Floats in the widest vector that the processor has, of at most ``most``: 16 by what DPH_AVX512 asks for, 8 by what
// DPH_AVX2 does, 4 by the baseline.
inline int vector_floats(int most = 16) {
#ifdef DPH_X86
  if (most >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return 16;
  }
  if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

}  // namespace dph
