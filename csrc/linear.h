// Products of few rows with a matrix of weights on the CPU, as in decoding token by token.
#pragma once

#include "common.h"

namespace dph {

// out = x W^T + bias. Weights are float, or bfloat16 if bf16 is set. The columns of all matrices are contiguous; rows are
// x_row, weight_row and out_row elements apart. A row of out depends on its row of x alone: the products are added up in
// the same order for any number of rows and of threads.
struct LinearArguments {
  int64_t rows = 0;
  int64_t columns = 0;  // of out: rows of the weights
  int64_t depth = 0;    // columns of x and of the weights
  const float* x = nullptr;
  int64_t x_row = 0;
  const void* weight = nullptr;
  int64_t weight_row = 0;
  bool bf16 = false;
  const float* bias = nullptr;  // [columns]; null for none
  float* out = nullptr;
  int64_t out_row = 0;
};

// Largest vector width in floats that is used from now on, at most ``most``; for tests.
int linear_lanes(int most);

void linear_forward_cpu(const LinearArguments& arguments, int threads);

}  // namespace dph
