// The joint preference objective (arXiv 2405.20053, section 3): loss, its slopes and all metrics in one pass.
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

// Figures of the metrics vector: of all, then of each head where there are several
// (dph_kernels/preference_loss/__init__.py names them).
constexpr int64_t PREFERENCE_METRICS = 12;
constexpr int64_t PREFERENCE_HEAD_METRICS = 5;

struct PreferenceArguments {
  const PreferenceInput* rewards;   // chosen, rejected; null: that part is off
  const PreferenceInput* logprobs;  // policy chosen, policy rejected, reference chosen, reference rejected; or null
  int64_t pairs;                    // N
  int64_t heads;                    // K
  float beta;
  float dpo_epsilon;
  float dph_epsilon;
  float dpo_weight;
  float dph_weight;
  bool contrastive;  // the DPH part; else separable
  float* loss;
  float* metrics;
  float* slopes;  // of both rewards [N, K], then of both log-probabilities of the policy [N], of the parts that are on
};

// One of the gradients, end to end.
struct PreferenceGradient {
  float* data;
  int64_t size;
};

void preference_loss_cpu(const PreferenceArguments& arguments, int threads);

// The slopes times the gradient of the loss, in the order of the slopes.
void preference_loss_gradients_cpu(const float* slopes, float grad, const PreferenceGradient* gradients, int64_t count,
                                   int threads);

}  // namespace dph
