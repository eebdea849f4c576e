// Residual connection and LayerNorm or RMSNorm on the CPU: each row is read and written once in the forward and the
// backward pass.
#pragma once

#include "common.h"

namespace dph {

// Rows of contiguous elements, float or bf16; strides in elements.
struct NormRows {
  void* data = nullptr;  // null if absent
  int64_t token = 0;     // stride of tokens
  int64_t head = 0;      // stride of the rows of a token
};

struct ResidualNorm {
  int64_t rows = 0;   // tokens times heads
  int64_t heads = 1;  // rows of a token
  int64_t columns = 0;
  bool bf16 = false;  // dtype of all tensors except mean and rstd
  bool rms = false;   // RMSNorm: no mean, no bias
  float eps = 0.0f;

  // Input of the normalisation: the sum written by the forward pass, or x if there is no update.
  NormRows total;
  const void* weight = nullptr;  // [columns]
  float* mean = nullptr;         // [rows], null if rms
  float* rstd = nullptr;         // [rows], 1 / standard deviation, or 1 / root mean square; null for no backward pass

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

// Limits the vector width to ``most`` floats, for tests, and returns the width in use.
int residual_norm_lanes(int most);

}  // namespace dph
