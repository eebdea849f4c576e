// Log-probabilities on the CPU: the passes over one tile of logits that dph_kernels/linear_logprob/native.py asks for
// between the matrix products.
#pragma once

#include "common.h"

namespace dph {

// Logits of some rows and some neighbouring columns of the vocabulary, in float, with what belongs to the rows.
struct LogprobTile {
  float* logits = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;  // elements from a row to the next; columns are contiguous
  int64_t first = 0;   // the first column's index in the vocabulary
  bool last = false;   // whether the vocabulary ends with this tile
  const int64_t* targets = nullptr;  // [rows], indices in the vocabulary

  // [rows] each. Tiles of the same rows come in the order of the vocabulary; until the last one of them, log_sum holds
  // the sum itself, logprobs the target's logit, and entropy the sum of exp(x - largest) * (x - largest).
  float* largest = nullptr;
  float* log_sum = nullptr;
  float* logprobs = nullptr;
  float* entropy = nullptr;  // null, and best with it: not wanted
  int64_t* best = nullptr;

  const float* upstream = nullptr;  // [rows], gradients only
};

// Takes a tile into largest, log_sum, logprobs, entropy and best.
void linear_logprob_reduce_cpu(const LogprobTile& tile, int threads);

// Turns logits into their gradients, in place: upstream * (onehot(target) - exp(logit - largest - log_sum)).
void linear_logprob_gradient_cpu(const LogprobTile& tile, int threads);

// Both, for a tile that is the whole vocabulary: a row is read from memory once.
void linear_logprob_both_cpu(const LogprobTile& tile, int threads);

}  // namespace dph
