// What every kernel here may use. No Python and no PyTorch: raw pointers in, error codes out.
#pragma once

#include <cstdint>
#include <cstring>

// Arithmetic that the CPU and the CUDA kernel of an operator share.
#ifdef __CUDACC__
#define DPH_INLINE __host__ __device__ __forceinline__
#else
#define DPH_INLINE inline __attribute__((always_inline))
#endif

// One function, compiled for AVX-512, AVX2 and the baseline; the loader takes the best one that the processor has.
// The body must reach its helpers by inlining (DPH_INLINE), or they stay at the baseline.
#if defined(__x86_64__) && defined(__linux__) && !defined(__CUDACC__)
#define DPH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DPH_CLONES
#endif

namespace dph {

DPH_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DPH_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DPH_INLINE float float_from_bf16(uint16_t value) { return float_from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
DPH_INLINE uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace dph
