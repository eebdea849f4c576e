// Residual connection and LayerNorm on the CPU: each row is read and written once in the forward and the backward pass.
#pragma once

#include "common.h"

namespace dph {

// Rows of contiguous elements, float or bf16.
struct NormRows {
  void* data = nullptr;  // null if absent
  int64_t row = 0;       // row stride in elements
};

struct ResidualNorm {
  int64_t rows = 0;
  int64_t columns = 0;
  bool bf16 = false;  // dtype of all tensors except mean and rstd
  float eps = 0.0f;

  // Input of the normalisation: the sum written by the forward pass, or x if there is no update.
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
  NormRows d_total;  // null if the sum is not used elsewhere
  NormRows d_normed;
  NormRows d_x;              // null if not requested
  void* d_weight = nullptr;  // [columns], or null if not requested
  void* d_bias = nullptr;    // [columns], or null if not requested
};

void residual_norm_forward_cpu(const ResidualNorm& a, int threads);
void residual_norm_backward_cpu(const ResidualNorm& a, int threads);

}  // namespace dph
