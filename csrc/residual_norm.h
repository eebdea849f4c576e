// Residual connection and LayerNorm on the CPU: a row is read from memory and written to it once, each way.
#pragma once

#include "common.h"

namespace dph {

// Rows of contiguous elements, float or bf16.
struct NormRows {
  void* data = nullptr;  // null: not there
  int64_t row = 0;       // elements from a row to the next
};

struct ResidualNorm {
  int64_t rows = 0;
  int64_t columns = 0;
  bool bf16 = false;  // elements, but for mean and rstd
  float eps = 0.0f;

  // What is normalised: the sum that the forward pass writes, or its first input where there is no update.
  NormRows total;
  const void* weight = nullptr;  // [columns]
  float* mean = nullptr;         // [rows]
  float* rstd = nullptr;         // [rows], 1 / standard deviation

  // Forward.
  NormRows x;
  NormRows update;
  const void* bias = nullptr;  // [columns], or null
  NormRows normed;

  // Backward.
  NormRows d_total;  // or null: the sum is not used elsewhere
  NormRows d_normed;
  NormRows d_x;              // or null: not wanted
  void* d_weight = nullptr;  // [columns], or null
  void* d_bias = nullptr;    // [columns], or null
};

void residual_norm_forward_cpu(const ResidualNorm& a, int threads);
void residual_norm_backward_cpu(const ResidualNorm& a, int threads);

}  // namespace dph
