// LaProp on the CPU: one pass over memory, all cores, in one call for any number of tensors.
#include "../laprop.h"

#include <algorithm>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dph {
namespace {

// Moments that no gradient feeds decay into subnormal numbers, which are many times slower; zero serves as well.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

template <bool BF16_GRAD, bool PRIOR, bool COPY>
DPH_INLINE void update(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin, int64_t size) {
  float* __restrict param = t.param + begin;
  float* __restrict exp_avg = t.exp_avg + begin;
  float* __restrict exp_avg_sq = t.exp_avg_sq + begin;
  const float* __restrict grad = static_cast<const float*>(t.grad) + (BF16_GRAD ? 0 : begin);
  const uint16_t* __restrict grad_bf16 = static_cast<const uint16_t*>(t.grad) + (BF16_GRAD ? begin : 0);
  const float* __restrict prior = PRIOR ? t.prior + begin : nullptr;
  uint16_t* __restrict copy = COPY ? t.copy + begin : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    const float g = scale * (BF16_GRAD ? float_from_bf16(grad_bf16[i]) : grad[i]);
    laprop_element(k, g, PRIOR ? prior[i] : p, p, m, v);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (COPY) copy[i] = bf16_from_float(p);
  }
}

}  // namespace

// The eight loops stand in one function, so that each is compiled for every instruction set.
DPH_CLONES void laprop_cpu_chunk(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin,
                                 int64_t size) {
  const int variant = (t.grad_is_bf16 ? 4 : 0) + (t.prior ? 2 : 0) + (t.copy ? 1 : 0);
  switch (variant) {
    case 0: return update<false, false, false>(t, k, scale, begin, size);
    case 1: return update<false, false, true>(t, k, scale, begin, size);
    case 2: return update<false, true, false>(t, k, scale, begin, size);
    case 3: return update<false, true, true>(t, k, scale, begin, size);
    case 4: return update<true, false, false>(t, k, scale, begin, size);
    case 5: return update<true, false, true>(t, k, scale, begin, size);
    case 6: return update<true, true, false>(t, k, scale, begin, size);
    default: return update<true, true, true>(t, k, scale, begin, size);
  }
}

void laprop_cpu(const LapropArguments& arguments, int threads) {
  const float scale = arguments.grad_scale ? *arguments.grad_scale : 1.0f;
  // Dynamic, as a core that something else has slowed down then takes fewer chunks instead of keeping all waiting; but
  // several neighbours at a time, as memory is faster where each core reads long runs.
  const int64_t run = std::clamp<int64_t>(arguments.chunks / (8 * std::max(threads, 1)), 1, 16);
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (arguments.chunks > 1)
  for (int64_t chunk = 0; chunk < arguments.chunks; ++chunk) {
    const FlushSubnormals guard;
    const LapropTensor& t = arguments.tensors[laprop_row(arguments.tensors, arguments.count, chunk)];
    const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
    laprop_cpu_chunk(t, arguments.coefficients, scale, begin, std::min(LAPROP_CHUNK, t.size - begin));
  }
}

}  // namespace dph
