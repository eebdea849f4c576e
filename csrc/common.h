// Helpers shared by all kernels. Independent of Python and PyTorch: raw pointers in, error codes out.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

// Inline functions: those shared by the CPU and CUDA kernels of an operator, and helpers of the CPU kernels, which must be
// inlined to be compiled for the caller's instruction set.
#ifdef __CUDACC__
#define DPH_INLINE __host__ __device__ __forceinline__
#else
#define DPH_INLINE inline __attribute__((always_inline))
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

// p, with e^x = p 2^n for x in [-104, 88]; n is the integer in the low bits of ``shifted``.
DPH_INLINE float exp_fraction(float x, float& shifted) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, stored in the low bits
  shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  float p = 1.9875691500e-4f;                                   // Cephes' expf, on [-ln 2 / 2, ln 2 / 2]
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// e^x to 1 ulp for x in [-87, 88], exactly 1 at 0; x is clamped to that range. The last step multiplies by 2^n so that
// NaN is propagated: an integer addition to the exponent bits could turn NaN into a number.
DPH_INLINE float exp_of(float x) {
  const float above = x < -87.0f ? -87.0f : x;
  float shifted;
  const float p = exp_fraction(above > 88.0f ? 88.0f : above, shifted);
  return p * float_from_bits((bits_from_float(shifted) << 23) + 0x3f800000u);
}

// 1 / (1 + e^-x), exactly 0 from about -104 on, as fp32 has it: minus infinity times the result is NaN.
DPH_INLINE float sigmoid_of(float x) {
  const float size = fabsf(x);
  float shifted;
  const float p = exp_fraction(-(size > 104.0f ? 104.0f : size), shifted);
  // 2^n as a product of two, for n below -126; bits << 22 is n / 2, rounded down, with a half that is cut off.
  const uint32_t bits = bits_from_float(shifted), half = (bits << 22) & 0xff800000u;
  const float e = p * float_from_bits(half + 0x3f800000u) * float_from_bits((bits << 23) - half + 0x3f800000u);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace dph
