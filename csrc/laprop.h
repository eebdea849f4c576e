// LaProp with decoupled prior and weight decay (SPEC.md 4): what the CPU and the CUDA kernel share.
#pragma once

#include "common.h"

#include <math.h>

namespace dph {

// One row of the table that describes a call; dph_kernels/laprop/native.py writes it as int64 words in this order.
struct LapropTensor {
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;    // float, or bf16 where grad_is_bf16
  const float* prior;  // null: no prior decay
  uint16_t* copy;      // bf16 copy of the parameter to refresh, or null
  int64_t size;        // elements
  int64_t first_chunk; // number of chunks in the rows above
  int64_t grad_is_bf16;
};
static_assert(sizeof(LapropTensor) == 9 * sizeof(int64_t), "native.py writes nine words to a row");

// Elements in one piece of work: small enough that many small tensors and a huge one both spread over all cores.
constexpr int64_t LAPROP_CHUNK = 16384;

struct LapropCoefficients {
  float beta1;
  float beta2;
  float square;          // 1 - beta2
  float step;            // (1 - beta1) * lr * sqrt(1 - beta2^t)
  float eps;
  float prior_decay;     // times lr
  float weight_decay;    // times lr
  float momentum_scale;  // 1 / c
};

struct LapropArguments {
  const LapropTensor* tensors;
  int64_t count;
  int64_t chunks;
  LapropCoefficients coefficients;
  const float* grad_scale;  // null: 1
};

// The update of one element. prior is the parameter itself where there is none.
DPH_INLINE void laprop_element(const LapropCoefficients& k, float grad, float prior, float& param, float& exp_avg,
                               float& exp_avg_sq) {
  exp_avg_sq = k.beta2 * exp_avg_sq + k.square * (grad * grad);
  exp_avg = k.beta1 * exp_avg + k.step * (grad / (sqrtf(exp_avg_sq) + k.eps));
  const float decay = k.prior_decay * (param - prior) + k.weight_decay * param;
  param -= decay + k.momentum_scale * exp_avg;
}

// The row that holds a chunk: the last one whose first_chunk is not above it (which also steps over empty tensors).
DPH_INLINE int64_t laprop_row(const LapropTensor* tensors, int64_t count, int64_t chunk) {
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

// tensors and grad_scale are host memory.
void laprop_cpu(const LapropArguments& arguments, int threads);

// tensors and grad_scale are device memory; returns a cudaError_t.
int laprop_cuda(const LapropArguments& arguments, void* stream);

}  // namespace dph
