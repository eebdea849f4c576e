// SwiGLU activation of the feed-forward network on the CPU, with one pass over memory each for forward and backward.
#pragma once

#include "common.h"

namespace dph {

constexpr int64_t SWIGLU_CHUNK = 32;  // rows per partial sum of gradients, independent of the number of threads

// Matrices are float, or bfloat16 if bf16 is set, with contiguous columns. Rows of projected and grad are projected_row
// and grad_row elements apart; rows of all other matrices are contiguous.
struct SwigluArguments {
  int64_t rows = 0;
  int64_t columns = 0;  // of out
  bool bf16 = false;
  const void* projected = nullptr;  // [rows, 2 columns], [x | gate] before the bias
  int64_t projected_row = 0;
  const float* bias = nullptr;  // [2 columns], or null
  void* out = nullptr;          // [rows, columns], forward only

  // Backward only.
  const void* grad = nullptr;  // [rows, columns]
  int64_t grad_row = 0;
  void* d_projected = nullptr;  // [rows, 2 columns]; null if not requested
  float* sums = nullptr;        // [chunks, 2 columns], sums over the chunk's rows of d_projected; null if not requested
};

void swiglu_forward_cpu(const SwigluArguments& arguments, int threads);
void swiglu_backward_cpu(const SwigluArguments& arguments, int threads);

}  // namespace dph
