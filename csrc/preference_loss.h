// Joint preference objective (arXiv 2405.20053, section 3): loss, slopes (its derivatives) and all metrics in one pass.
#pragma once

#include "common.h"

namespace dph {

// One input: [N] or [N, K], fp32 or bf16; strides in elements.
struct PreferenceInput {
  const void* data;
  int64_t row;
  int64_t head;
  bool bf16;
};

// Length of the metrics vector: overall metrics, then those of each head if there are several (named in
// dph_kernels/preference_loss/reference.py).
constexpr int64_t PREFERENCE_METRICS = 12;
constexpr int64_t PREFERENCE_HEAD_METRICS = 5;

struct PreferenceArguments {
  const PreferenceInput* rewards;   // chosen, rejected; null disables the DPH part
  const PreferenceInput* logprobs;  // policy chosen, policy rejected, reference chosen, reference rejected; or null
  int64_t pairs;                    // N
  int64_t heads;                    // K
  float beta;
  float dpo_epsilon;
  float dph_epsilon;
  float dpo_weight;
  float dph_weight;
  bool contrastive;  // DPH part: contrastive, else separable
  float* loss;
  float* metrics;
  float* slopes;  // enabled parts only: both rewards [N, K] each, then both policy log-probabilities [N] each
};

// One contiguous gradient.
struct PreferenceGradient {
  float* data;
  int64_t size;
};

void preference_loss_cpu(const PreferenceArguments& arguments, int threads);

// gradients = grad * slopes, in the order of the slopes; grad is the gradient of the loss.
void preference_loss_gradients_cpu(const float* slopes, float grad, const PreferenceGradient* gradients, int64_t count,
                                   int threads);

}  // namespace dph
