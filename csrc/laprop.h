// LaProp with decoupled prior and weight decay, and the gradient norm for clipping: declarations and arithmetic shared
// by the CPU and CUDA kernels.
#pragma once

#include "common.h"

#include <float.h>
#include <math.h>

namespace dph {

// One row of the tensor table of a call; dph_kernels/laprop/native.py writes it as int64 words in this order.
struct LapropTensor {
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;    // float, or bf16 if kinds has LAPROP_BF16_GRAD
  const void* prior;   // float, or bf16 if kinds has LAPROP_BF16_PRIOR; null: no prior decay
  uint16_t* copy;      // bf16 copy of the parameter to refresh, or null
  int64_t size;        // elements
  int64_t first_chunk; // number of chunks in the preceding rows
  int64_t kinds;
};
static_assert(sizeof(LapropTensor) == 9 * sizeof(int64_t), "native.py writes nine words to a row");

constexpr int64_t LAPROP_BF16_GRAD = 1, LAPROP_BF16_PRIOR = 2;  // as in native.py

// One row of the tensor table of a gradient norm call.
struct GradientTensor {
  const void* grad;
  int64_t size;
  int64_t first_chunk;
  int64_t kinds;
};
static_assert(sizeof(GradientTensor) == 4 * sizeof(int64_t), "native.py writes four words to a row");

// Elements per work item, small enough to balance both many small tensors and one huge tensor over all cores.
constexpr int64_t LAPROP_CHUNK = 16384;

// Hyper-parameters in double, because 1 - beta and lr * decay lose precision in float.
struct LapropSettings {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double prior_decay;
  double bias_correction;
  double momentum_scale;
};

// Precomputed coefficients of the element-wise update.
struct LapropCoefficients {
  float beta1;
  float beta2;
  float square;          // 1 - beta2
  float step;            // (1 - beta1) * lr * sqrt(1 - beta2^t)
  float eps;
  float prior_decay;     // multiplied by lr
  float weight_decay;    // multiplied by lr
  float momentum_scale;  // 1 / c
};

// Number of completed steps and moving average of their learning rates; 1 / c = lr / rate_average.
struct LapropClock {
  double step;
  double rate_average;
};

struct LapropArguments {
  const LapropTensor* tensors;
  int64_t count;
  int64_t chunks;
  LapropSettings settings;
  const float* grad_scale;           // null: 1. If it is not finite, the call has no effect
  LapropClock* clock;                // null: use the corrections in settings; else advanced by one step
  const double* rate;                // null: settings.lr
  LapropCoefficients* coefficients;  // CUDA with a clock: output buffer of the clock kernel
};

struct GradientNormArguments {
  const GradientTensor* tensors;
  int64_t count;
  int64_t chunks;
  double max_norm;
  double* partials;  // one sum of squares per chunk
  double* norm;
  float* scale;      // min(1, max_norm / norm), NaN if the norm is not finite
  bool* finite;
};

DPH_INLINE LapropCoefficients laprop_coefficients(const LapropSettings& s) {
  LapropCoefficients k;
  k.beta1 = static_cast<float>(s.beta1);
  k.beta2 = static_cast<float>(s.beta2);
  k.square = static_cast<float>(1.0 - s.beta2);
  k.step = static_cast<float>((1.0 - s.beta1) * s.lr * s.bias_correction);
  k.eps = static_cast<float>(s.eps);
  k.prior_decay = static_cast<float>(s.prior_decay * s.lr);
  k.weight_decay = static_cast<float>(s.weight_decay * s.lr);
  k.momentum_scale = static_cast<float>(s.momentum_scale);
  return k;
}

// Advances the clock by one step and returns the coefficients of the new step.
DPH_INLINE LapropCoefficients laprop_advance(LapropSettings s, const double* rate, LapropClock& clock) {
  if (rate) s.lr = *rate;
  clock.step += 1.0;
  clock.rate_average = s.beta1 * clock.rate_average + (1.0 - s.beta1) * s.lr;
  s.bias_correction = sqrt(1.0 - pow(s.beta2, clock.step));
  s.momentum_scale = s.lr != 0.0 ? s.lr / clock.rate_average : 1.0;
  return laprop_coefficients(s);
}

DPH_INLINE bool laprop_finite(float scale) { return fabsf(scale) <= FLT_MAX; }

DPH_INLINE float laprop_load(const float* values, int64_t i) { return values[i]; }
DPH_INLINE float laprop_load(const uint16_t* values, int64_t i) { return float_from_bf16(values[i]); }

// Updates one element; ``lead`` is the distance of the parameter from its prior, 0 without prior decay.
DPH_INLINE void laprop_element(const LapropCoefficients& k, float grad, float lead, float& param, float& exp_avg,
                               float& exp_avg_sq) {
  exp_avg_sq = k.beta2 * exp_avg_sq + k.square * (grad * grad);
  exp_avg = k.beta1 * exp_avg + k.step * (grad / (sqrtf(exp_avg_sq) + k.eps));
  const float pull = k.weight_decay == 0.0f ? 0.0f : k.weight_decay * param;  // an infinite parameter stays infinite
  const float decay = k.prior_decay * lead + pull;
  param -= decay + k.momentum_scale * exp_avg;
}

// Norm, clipping coefficient and finite flag from the sum of squares. In double, finite gradients cannot overflow it.
DPH_INLINE void gradient_norm_result(const GradientNormArguments& a, double squares) {
  const double norm = sqrt(squares);
  const bool finite = norm <= DBL_MAX;
  *a.norm = norm;
  *a.scale = finite ? static_cast<float>(norm > a.max_norm ? a.max_norm / norm : 1.0) : NAN;
  *a.finite = finite;
}

// Index of the row that contains a chunk: the last row with first_chunk <= chunk, which also skips empty tensors.
template <class Row>
DPH_INLINE int64_t laprop_row(const Row* tensors, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (tensors[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// All pointers refer to host memory.
void laprop_cpu(const LapropArguments& arguments, int threads);
void gradient_norm_cpu(const GradientNormArguments& arguments, int threads);

// All pointers refer to device memory; both functions return a cudaError_t.
int laprop_cuda(const LapropArguments& arguments, void* stream);
int gradient_norm_cuda(const GradientNormArguments& arguments, void* stream);

}  // namespace dph
