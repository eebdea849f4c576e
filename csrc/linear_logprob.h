// Log-probabilities on the CPU: passes over one tile of logits, called by dph_kernels/linear_logprob/native.py between
// the matrix products.
#pragma once

#include "common.h"

namespace dph {

// A tile of float logits (a block of rows and a contiguous range of the vocabulary) and the state of its rows.
struct LogprobTile {
  float* logits = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;  // row stride in elements; columns are contiguous
  int64_t first = 0;   // vocabulary index of the first column
  bool last = false;   // whether this is the last tile of the vocabulary
  const int64_t* targets = nullptr;  // [rows], vocabulary indices

  // [rows] each. Tiles of the same rows must be processed in vocabulary order. Before the last one, log_sum holds the
  // sum itself, logprobs the target's logit, and entropy the sum of exp(x - largest) * (x - largest).
  float* largest = nullptr;
  float* log_sum = nullptr;
  float* logprobs = nullptr;
  float* entropy = nullptr;  // null, like best, if not requested
  int64_t* best = nullptr;

  const float* upstream = nullptr;  // [rows], gradient pass only
  float* factors = nullptr;         // [rows], linear_logprob_keep_cpu only
};

// Updates largest, log_sum, logprobs, entropy and best with one tile.
void linear_logprob_reduce_cpu(const LogprobTile& tile, int threads);

// Replaces the logits by their gradients, in place: upstream * (onehot(target) - exp(logit - largest - log_sum)).
void linear_logprob_gradient_cpu(const LogprobTile& tile, int threads);

// Both passes for upstream gradients of 1 and a tile that spans the whole vocabulary, each row of which is read from
// memory once. The logits' gradients are ``factors`` times what replaces the logits: products scale fewer numbers by it.
void linear_logprob_keep_cpu(const LogprobTile& tile, int threads);

}  // namespace dph
