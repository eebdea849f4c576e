// LaProp on the CPU: one multithreaded pass over memory, in one call for any number of tensors.
#include "../laprop.h"
#include "instruction_sets.h"

#include <algorithm>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dph {
namespace {

// Flushes subnormals to zero: moments without gradients decay to subnormal numbers, which are many times slower, while
// zero serves equally well.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

struct Nothing {};

DPH_INLINE float lead(const float* prior, int64_t i, float param) { return param - prior[i]; }
DPH_INLINE float lead(const uint16_t* prior, int64_t i, float param) { return param - float_from_bf16(prior[i]); }
DPH_INLINE float lead(const Nothing*, int64_t, float) { return 0.0f; }

template <class Grad, class Prior, bool COPY>
DPH_INLINE void update(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin, int64_t size) {
  float* __restrict param = t.param + begin;
  float* __restrict exp_avg = t.exp_avg + begin;
  float* __restrict exp_avg_sq = t.exp_avg_sq + begin;
  const Grad* __restrict grad = static_cast<const Grad*>(t.grad) + begin;
  const Prior* __restrict prior = static_cast<const Prior*>(t.prior) + (t.prior ? begin : 0);
  uint16_t* __restrict copy = COPY ? t.copy + begin : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    laprop_element(k, scale * laprop_load(grad, i), lead(prior, i, p), p, m, v);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (COPY) copy[i] = bf16_from_float(p);
  }
}

// Number of adjacent chunks per dynamic scheduling step. Dynamic scheduling assigns fewer chunks to a core that is
// slowed down by other load; several chunks per step, because memory bandwidth is higher if each core reads long runs.
int64_t run_length(int64_t chunks, int threads) {
  return std::clamp<int64_t>(chunks / (8 * std::max(threads, 1)), 1, 16);
}

DPH_INLINE void chunk(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin, int64_t size) {
  const int prior = t.prior ? (t.kinds & LAPROP_BF16_PRIOR ? 2 : 1) : 0;
  switch ((t.kinds & LAPROP_BF16_GRAD ? 6 : 0) + 2 * prior + (t.copy ? 1 : 0)) {
    case 0: return update<float, Nothing, false>(t, k, scale, begin, size);
    case 1: return update<float, Nothing, true>(t, k, scale, begin, size);
    case 2: return update<float, float, false>(t, k, scale, begin, size);
    case 3: return update<float, float, true>(t, k, scale, begin, size);
    case 4: return update<float, uint16_t, false>(t, k, scale, begin, size);
    case 5: return update<float, uint16_t, true>(t, k, scale, begin, size);
    case 6: return update<uint16_t, Nothing, false>(t, k, scale, begin, size);
    case 7: return update<uint16_t, Nothing, true>(t, k, scale, begin, size);
    case 8: return update<uint16_t, float, false>(t, k, scale, begin, size);
    case 9: return update<uint16_t, float, true>(t, k, scale, begin, size);
    case 10: return update<uint16_t, uint16_t, false>(t, k, scale, begin, size);
    default: return update<uint16_t, uint16_t, true>(t, k, scale, begin, size);
  }
}

// The twelve loops, instantiated for every instruction set.
#define DPH_CHUNK(name)                                                                                        \
  void name(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin, int64_t size) {    \
    chunk(t, k, scale, begin, size);                                                                           \
  }
DPH_CHUNK(baseline)
#ifdef DPH_X86
DPH_AVX2 DPH_CHUNK(avx2)
DPH_AVX512 DPH_CHUNK(avx512)
#endif
#undef DPH_CHUNK

using Chunk = void (*)(const LapropTensor&, const LapropCoefficients&, float, int64_t, int64_t);

Chunk pick() {
#ifdef DPH_X86
  if (vector_floats() == 16) return avx512;
  if (vector_floats() == 8) return avx2;
#endif
  return baseline;
}

const Chunk update_chunk = pick();

}  // namespace

void laprop_cpu(const LapropArguments& a, int threads) {
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  if (!laprop_finite(scale)) return;
  const LapropCoefficients k = a.clock ? laprop_advance(a.settings, a.rate, *a.clock) : laprop_coefficients(a.settings);
  const int64_t run = run_length(a.chunks, threads);
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (a.chunks > 1)
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const FlushSubnormals guard;
    const LapropTensor& t = a.tensors[laprop_row(a.tensors, a.count, chunk)];
    const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
    update_chunk(t, k, scale, begin, std::min(LAPROP_CHUNK, t.size - begin));
  }
}

namespace {

// Sixteen independent accumulators, which are added in the same order on every instruction set.
template <class Grad>
DPH_INLINE double squares(const Grad* grad, int64_t size) {
  constexpr int LANES = 16;
  double lanes[LANES] = {};
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      const double g = laprop_load(grad, i + lane);
      lanes[lane] += g * g;
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    const double g = laprop_load(grad, i);
    lanes[i - whole] += g * g;
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

DPH_INLINE double chunk_squares(const GradientTensor& t, int64_t begin, int64_t size) {
  if (t.kinds & LAPROP_BF16_GRAD) return squares(static_cast<const uint16_t*>(t.grad) + begin, size);
  return squares(static_cast<const float*>(t.grad) + begin, size);
}

#define DPH_SQUARES(name) \
  double squares_##name(const GradientTensor& t, int64_t begin, int64_t size) { return chunk_squares(t, begin, size); }
DPH_SQUARES(baseline)
#ifdef DPH_X86
DPH_AVX2 DPH_SQUARES(avx2)
DPH_AVX512 DPH_SQUARES(avx512)
#endif
#undef DPH_SQUARES

using Squares = double (*)(const GradientTensor&, int64_t, int64_t);

Squares pick_squares() {
#ifdef DPH_X86
  if (vector_floats() == 16) return squares_avx512;
  if (vector_floats() == 8) return squares_avx2;
#endif
  return squares_baseline;
}

const Squares gradient_squares = pick_squares();

}  // namespace

void gradient_norm_cpu(const GradientNormArguments& a, int threads) {
  const int64_t run = run_length(a.chunks, threads);
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (a.chunks > 1)
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const GradientTensor& t = a.tensors[laprop_row(a.tensors, a.count, chunk)];
    const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
    a.partials[chunk] = gradient_squares(t, begin, std::min(LAPROP_CHUNK, t.size - begin));
  }
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += a.partials[chunk];
  gradient_norm_result(a, sum);
}

}  // namespace dph
