// The gated activation of the feed-forward network on the CPU, in one pass each way.
#pragma once

#include "common.h"

namespace dph {

constexpr int64_t SWIGLU_CHUNK = 32;  // rows whose gradients are added up together, whatever the number of threads

// Matrices are of float, or of bfloat16 where bf16 says so; their columns are contiguous, their rows so many elements
// apart as is said, or end to end.
struct SwigluArguments {
  int64_t rows = 0;
  int64_t columns = 0;  // of the result
  bool bf16 = false;
  const void* projected = nullptr;  // [rows, 2 columns], giving [x | gate]
  int64_t projected_row = 0;
  const float* bias = nullptr;  // [2 columns]
  void* out = nullptr;          // [rows, columns], forward only

  // Backward only.
  const void* grad = nullptr;  // [rows, columns]
  int64_t grad_row = 0;
  void* d_projected = nullptr;  // [rows, 2 columns]; null: not wanted
  float* sums = nullptr;        // [chunks, 2 columns], of each chunk's rows of d_projected; null: not wanted
};

void swiglu_forward_cpu(const SwigluArguments& arguments, int threads);
void swiglu_backward_cpu(const SwigluArguments& arguments, int threads);

}  // namespace dph
