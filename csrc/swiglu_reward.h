// Pooler and reward heads on the CPU (paper, section 3.1): arguments passed by dph_kernels/swiglu_reward/native.py.
#pragma once

#include "common.h"

namespace dph {

// A matrix, or a vector if column = 0, in the dtype of the hidden states; strides in elements. data is null if absent.
struct RewardMatrix {
  void* data = nullptr;
  int64_t row = 0;
  int64_t column = 0;
};

// One of the two dropouts: an element is kept if its Philox word >= threshold, and is then divided by keep.
struct RewardDropout {
  uint32_t threshold = 0;  // 0: nothing is dropped
  uint32_t stream = 0;
  float keep = 1.0f;
};

struct SwigluRewardArguments {
  int64_t rows = 0;     // R
  int64_t columns = 0;  // C
  int64_t width = 0;    // F; 0: no w1
  int64_t heads = 0;    // K
  bool bf16 = false;    // hidden, all weights and their gradients are bf16; all other tensors are float

  RewardMatrix hidden;  // [R, C]
  RewardMatrix reward;  // [K, C]
  RewardMatrix w1, b1;  // [2F, C] ([x | gate]), [2F]
  RewardMatrix w2, b2;  // [C, F], or [C, C] without w1; [C]

  const int64_t* row_ids = nullptr;  // [R]; null: 0 .. R-1
  uint64_t seed = 0;
  RewardDropout input, pooled;

  float* rewards = nullptr;  // [R, K]
  // Saved for the backward pass, or null: 2F and C features, each of R floats padded to a multiple of REWARD_LANES.
  float* kept_projected = nullptr;
  float* kept_pooled = nullptr;

  // Backward only. The results are contiguous, and null if not requested.
  const float* grad = nullptr;  // [R, K]
  int64_t grad_row = 0;
  int64_t grad_column = 0;
  void* d_hidden = nullptr;
  void* d_reward = nullptr;
  void* d_w1 = nullptr;
  void* d_b1 = nullptr;
  void* d_w2 = nullptr;
  void* d_b2 = nullptr;
};

constexpr int64_t REWARD_LANES = 16;  // the number of rows is padded to a multiple of this

// Limits the vector width to ``most`` floats and returns the width selected for this CPU. For tests.
int swiglu_reward_lanes(int most);

void swiglu_reward_forward_cpu(const SwigluRewardArguments& arguments, int threads);

void swiglu_reward_backward_cpu(const SwigluRewardArguments& arguments, int threads);

}  // namespace dph
