// SwiGLU on the CPU: each element is read and written once per pass, with parallel loops over rows.
#include "../swiglu.h"
#include "instruction_sets.h"
#include "threads.h"

#include <math.h>

#include <algorithm>

namespace dph {
namespace {

constexpr int64_t SMALL = 16384;  // elements up to which a second thread does not pay off

DPH_INLINE float value(float x) { return x; }
DPH_INLINE float value(uint16_t bf16) { return float_from_bf16(bf16); }
DPH_INLINE void put(float& to, float x) { to = x; }
DPH_INLINE void put(uint16_t& to, float x) { to = bf16_from_float(x); }

template <class T, bool BIAS>
DPH_INLINE void forward(const SwigluArguments& a, int64_t row) {
  const T* __restrict x = static_cast<const T*>(a.projected) + row * a.projected_row;
  const T* __restrict gate = x + a.columns;
  const float *__restrict x_bias = a.bias, *__restrict gate_bias = BIAS ? a.bias + a.columns : nullptr;
  T* __restrict out = static_cast<T*>(a.out) + row * a.columns;
#pragma omp simd
  for (int64_t i = 0; i < a.columns; ++i) {
    const float g = BIAS ? value(gate[i]) + gate_bias[i] : value(gate[i]);
    put(out[i], (BIAS ? value(x[i]) + x_bias[i] : value(x[i])) * (g * sigmoid_of(g)));
  }
}

template <class T, bool BIAS, bool STORE, bool SUMS>
DPH_INLINE void backward(const SwigluArguments& a, int64_t chunk) {
  const float *__restrict x_bias = a.bias, *__restrict gate_bias = BIAS ? a.bias + a.columns : nullptr;
  float* __restrict x_sums = SUMS ? a.sums + chunk * 2 * a.columns : nullptr;
  float* __restrict gate_sums = SUMS ? x_sums + a.columns : nullptr;
  if (SUMS) std::fill_n(x_sums, 2 * a.columns, 0.0f);
  const int64_t end = std::min((chunk + 1) * SWIGLU_CHUNK, a.rows);
  for (int64_t row = chunk * SWIGLU_CHUNK; row < end; ++row) {
    const T* __restrict x = static_cast<const T*>(a.projected) + row * a.projected_row;
    const T* __restrict gate = x + a.columns;
    const T* __restrict grad = static_cast<const T*>(a.grad) + row * a.grad_row;
    T* __restrict dx = STORE ? static_cast<T*>(a.d_projected) + row * 2 * a.columns : nullptr;
    T* __restrict dgate = STORE ? dx + a.columns : nullptr;
#pragma omp simd
    for (int64_t i = 0; i < a.columns; ++i) {
      const float d = value(grad[i]), g = BIAS ? value(gate[i]) + gate_bias[i] : value(gate[i]), s = sigmoid_of(g);
      // d times silu's derivative, which reaches 1.1, could overflow.
      const float up = BIAS ? value(x[i]) + x_bias[i] : value(x[i]);
      const float to_x = d * (g * s), to_gate = d * up * (s * (1.0f + g * (1.0f - s)));
      if (STORE) {
        put(dx[i], to_x);
        put(dgate[i], to_gate);
      }
      if (SUMS) {
        x_sums[i] += to_x;
        gate_sums[i] += to_gate;
      }
    }
  }
}

template <class T>
DPH_INLINE void forward(const SwigluArguments& a, int64_t row) {
  a.bias ? forward<T, true>(a, row) : forward<T, false>(a, row);
}

template <class T>
DPH_INLINE void backward(const SwigluArguments& a, int64_t chunk) {
  if (!a.bias) return backward<T, false, true, false>(a, chunk);  // sums are for the bias
  if (!a.sums) return backward<T, true, true, false>(a, chunk);
  if (!a.d_projected) return backward<T, true, false, true>(a, chunk);
  backward<T, true, true, true>(a, chunk);
}

// Forward pass of a row and backward pass of a chunk of rows, instantiated for every instruction set.
struct Kernels {
  void (*forward)(const SwigluArguments&, int64_t row);
  void (*backward)(const SwigluArguments&, int64_t chunk);
};
#define DPH_KERNELS(name, target)                                                  \
  target void forward_##name(const SwigluArguments& a, int64_t row) {              \
    a.bf16 ? forward<uint16_t>(a, row) : forward<float>(a, row);                   \
  }                                                                                \
  target void backward_##name(const SwigluArguments& a, int64_t chunk) {           \
    a.bf16 ? backward<uint16_t>(a, chunk) : backward<float>(a, chunk);             \
  }                                                                                \
  constexpr Kernels name = {forward_##name, backward_##name};
DPH_KERNELS(baseline, )
#ifdef DPH_X86
DPH_KERNELS(avx2, DPH_AVX2)
DPH_KERNELS(avx512, DPH_AVX512)
#endif
#undef DPH_KERNELS

Kernels pick() {
#ifdef DPH_X86
  if (vector_floats() == 16) return avx512;
  if (vector_floats() == 8) return avx2;
#endif
  return baseline;
}

const Kernels kernels = pick();

}  // namespace

void swiglu_forward_cpu(const SwigluArguments& a, int threads) {
  for_each(a.rows, threads, a.rows * a.columns > SMALL, [&](int64_t row) { kernels.forward(a, row); });
}

void swiglu_backward_cpu(const SwigluArguments& a, int threads) {
  const int64_t chunks = (a.rows + SWIGLU_CHUNK - 1) / SWIGLU_CHUNK;
  for_each(chunks, threads, a.rows * a.columns > SMALL, [&](int64_t chunk) { kernels.backward(a, chunk); });
}

}  // namespace dph
