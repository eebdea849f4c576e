// Pooler and reward heads on the CPU (paper, section 3.1): what dph_kernels/swiglu_reward/native.py hands over.
#pragma once

#include "common.h"

namespace dph {

// A matrix or (column = 0) a vector in the dtype of the hidden states; strides in elements. data null: there is none.
struct RewardMatrix {
  void* data = nullptr;
  int64_t row = 0;
  int64_t column = 0;
};

// One of the two dropouts: an element is kept where its Philox word >= threshold, and is then divided by keep.
struct RewardDropout {
  uint32_t threshold = 0;  // 0: nothing drops
  uint32_t stream = 0;
  float keep = 1.0f;
};

struct SwigluRewardArguments {
  int64_t rows = 0;     // R
  int64_t columns = 0;  // C
  int64_t width = 0;    // F; 0: no w1
  int64_t heads = 0;    // K
  bool bf16 = false;    // of hidden, all weights and all their gradients; all else is float

  RewardMatrix hidden;  // [R, C]
  RewardMatrix reward;  // [K, C]
  RewardMatrix w1, b1;  // [2F, C] ([x | gate]), [2F]
  RewardMatrix w2, b2;  // [C, F], or [C, C] without w1; [C]

  const int64_t* row_ids = nullptr;  // [R]; null: 0 .. R-1
  uint64_t seed = 0;
  RewardDropout input, pooled;

  float* rewards = nullptr;  // [R, K]
  // Kept for the backward pass, or null: R, padded to whole lanes, floats for each of the 2F and of the C features.
  float* kept_projected = nullptr;
  float* kept_pooled = nullptr;

  // Backward only. The gradients are contiguous, and null where they are not wanted.
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

constexpr int64_t REWARD_LANES = 16;  // rows are padded to a multiple of it

// Use vectors of at most ``most`` floats from now on; returns what the processor has of them. For tests.
int swiglu_reward_lanes(int most);

void swiglu_reward_forward_cpu(const SwigluRewardArguments& arguments, int threads);

void swiglu_reward_backward_cpu(const SwigluRewardArguments& arguments, int threads);

}  // namespace dph
