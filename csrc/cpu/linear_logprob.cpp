// Log-probabilities on the CPU: each logit of a tile is read from memory once, with parallel loops over rows.
#include "../linear_logprob.h"
#include "instruction_sets.h"

#include <math.h>

#include <algorithm>

namespace dph {
namespace {

constexpr int64_t BLOCK = 1024;  // columns per block, which stays in the L1 cache between maximum and exp
constexpr float LOWEST = -87.0f;  // exp is subnormal below this

// e^x for x <= 0, 0 below LOWEST.
DPH_INLINE float exp_negative(float x) { return x < LOWEST ? 0.0f : exp_of(x); }

// Running state of one row: sums of e^(x - largest) and of e^(x - largest) (x - largest).
struct State {
  float largest;
  float sum;
  float weighted;
  int64_t best;  // first column of the block that contains the largest, or -1 if that is in an earlier tile
};

DPH_INLINE float block_largest(const float* __restrict x, int64_t size) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < size; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

template <bool STATISTICS>
DPH_INLINE void add_block(State& state, const float* __restrict x, int64_t begin, int64_t size, bool start) {
  const float largest = block_largest(x, size);
  if (start) {
    state = {largest, 0.0f, 0.0f, begin};
  } else if (largest > state.largest) {
    const float shift = state.largest - largest, factor = exp_negative(shift);
    // If the factor is 0, the previous sums vanish; the shift may then be infinite.
    state.weighted = factor > 0.0f ? factor * (state.weighted + shift * state.sum) : 0.0f;
    state.sum *= factor;
    state.largest = largest;
    state.best = begin;
  }
  const float origin = state.largest > -INFINITY ? state.largest : 0.0f;  // else only minus infinity (or NaN) so far
  float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < size; ++i) {
    const float shifted = x[i] - origin, e = exp_negative(shifted);
    sum += e;
    // A logit of minus infinity contributes nothing to the entropy.
    if (STATISTICS) weighted += e * (shifted < LOWEST ? LOWEST : shifted);
  }
  state.sum += sum;
  state.weighted += weighted;
}

// Column of the largest logit: the first one in its block. With NaN, any column is valid.
DPH_INLINE int64_t first_largest(const LogprobTile& tile, int64_t row, const State& state) {
  const float* x = tile.logits + row * tile.stride;
  int64_t column = state.best;
  while (column < tile.columns - 1 && !(x[column] == state.largest)) ++column;
  return tile.first + column;
}

// Results of a row whose target's logit is in ``logprobs``. The sum includes e^0, so it is at least 1, and no target's
// logit exceeds the largest: the result is never positive.
template <bool STATISTICS>
DPH_INLINE void finish(const LogprobTile& tile, int64_t row, const State& state) {
  const float log_sum = logf(state.sum);
  tile.largest[row] = state.largest;
  tile.log_sum[row] = log_sum;
  tile.logprobs[row] = (tile.logprobs[row] - state.largest) - log_sum;
  if (STATISTICS) tile.entropy[row] = log_sum - state.weighted / state.sum;
}

template <bool STATISTICS>
DPH_INLINE void reduce(const LogprobTile& tile, int64_t row) {
  const float* x = tile.logits + row * tile.stride;
  const bool start = tile.first == 0;
  State state = {0.0f, 0.0f, 0.0f, -1};
  if (!start) state = {tile.largest[row], tile.log_sum[row], STATISTICS ? tile.entropy[row] : 0.0f, -1};
  for (int64_t begin = 0; begin < tile.columns; begin += BLOCK) {
    add_block<STATISTICS>(state, x + begin, begin, std::min(BLOCK, tile.columns - begin), start && begin == 0);
  }
  if (STATISTICS && state.best >= 0) tile.best[row] = first_largest(tile, row, state);
  const int64_t target = tile.targets[row] - tile.first;
  if (target >= 0 && target < tile.columns) tile.logprobs[row] = x[target];
  tile.largest[row] = state.largest;
  tile.log_sum[row] = state.sum;
  if (STATISTICS) tile.entropy[row] = state.weighted;
  if (tile.last) finish<STATISTICS>(tile, row, state);
}

// Gradients of the logits, in place.
DPH_INLINE void gradient(const LogprobTile& tile, int64_t row) {
  float* __restrict x = tile.logits + row * tile.stride;
  const float largest = tile.largest[row], log_sum = tile.log_sum[row], upstream = tile.upstream[row];
  const int64_t target = tile.targets[row] - tile.first;
  const bool here = target >= 0 && target < tile.columns;
  const float logprob = here ? (x[target] - largest) - log_sum : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < tile.columns; ++i) {
    const float gradient = -upstream * exp_negative((x[i] - largest) - log_sum);
    x[i] = fabsf(gradient) < 1.17549435e-38f ? 0.0f : gradient;  // subnormal numbers slow down the matrix products
  }
  if (here) x[target] = -upstream * expm1f(logprob);  // 1 - p without cancellation for p near 1
}

// Results, and gradients of the logits up to a factor of the row, from one exponential of each logit.
template <bool STATISTICS>
DPH_INLINE void reduce_and_keep(const LogprobTile& tile, int64_t row) {
  float* __restrict x = tile.logits + row * tile.stride;
  State state = {-INFINITY, 0.0f, 0.0f, 0};
  for (int64_t begin = 0; begin < tile.columns; begin += BLOCK) {
    const float largest = block_largest(x + begin, std::min(BLOCK, tile.columns - begin));
    if (largest > state.largest) state.largest = largest, state.best = begin;
  }
  if (STATISTICS) tile.best[row] = first_largest(tile, row, state);
  const int64_t target = tile.targets[row];
  tile.logprobs[row] = x[target];
  const float origin = state.largest > -INFINITY ? state.largest : 0.0f;
  for (int64_t begin = 0; begin < tile.columns; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, tile.columns - begin);
    float* __restrict part = x + begin;
    float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t i = 0; i < size; ++i) {
      const float shifted = part[i] - origin, e = exp_negative(shifted);
      sum += e;
      if (STATISTICS) weighted += e * (shifted < LOWEST ? LOWEST : shifted);
      part[i] = e;
    }
    state.sum += sum;
    state.weighted += weighted;
  }
  finish<STATISTICS>(tile, row, state);
  x[target] = state.sum * expm1f(tile.logprobs[row]);  // p - 1 without cancellation for p near 1
  tile.factors[row] = -1.0f / state.sum;
}

DPH_INLINE void run_reduce(const LogprobTile& tile, int64_t row) {
  tile.best ? reduce<true>(tile, row) : reduce<false>(tile, row);
}

DPH_INLINE void run_keep(const LogprobTile& tile, int64_t row) {
  tile.best ? reduce_and_keep<true>(tile, row) : reduce_and_keep<false>(tile, row);
}

// The passes over a row, instantiated for every instruction set.
struct Kernels {
  void (*reduce)(const LogprobTile&, int64_t);
  void (*gradient)(const LogprobTile&, int64_t);
  void (*reduce_and_keep)(const LogprobTile&, int64_t);
};
#define DPH_KERNELS(name, target)                                                                       \
  target void reduce_##name(const LogprobTile& tile, int64_t row) { run_reduce(tile, row); }            \
  target void gradient_##name(const LogprobTile& tile, int64_t row) { gradient(tile, row); }            \
  target void reduce_and_keep_##name(const LogprobTile& tile, int64_t row) { run_keep(tile, row); }     \
  constexpr Kernels name = {reduce_##name, gradient_##name, reduce_and_keep_##name};
DPH_KERNELS(baseline, )
#ifdef DPH_X86
DPH_KERNELS(avx2, DPH_AVX2)
DPH_KERNELS(avx512, DPH_AVX512)
#endif
#undef DPH_KERNELS

Kernels pick() {
#ifdef DPH_X86
  if (vector_floats() == 16) return avx512;
  if (vector_floats() == 8) return avx2;
#endif
  return baseline;
}

const Kernels kernels = pick();

void run(void (*kernel)(const LogprobTile&, int64_t), const LogprobTile& tile, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tile.rows * tile.columns > 16384)
  for (int64_t row = 0; row < tile.rows; ++row) kernel(tile, row);
}

}  // namespace

void linear_logprob_reduce_cpu(const LogprobTile& tile, int threads) { run(kernels.reduce, tile, threads); }

void linear_logprob_gradient_cpu(const LogprobTile& tile, int threads) { run(kernels.gradient, tile, threads); }

void linear_logprob_keep_cpu(const LogprobTile& tile, int threads) { run(kernels.reduce_and_keep, tile, threads); }

}  // namespace dph
