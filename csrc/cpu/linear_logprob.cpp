// Log-probabilities on the CPU: each logit of a tile is read from memory once, rows are spread over the cores.
#include "../linear_logprob.h"

#include <math.h>

#include <algorithm>

namespace dph {
namespace {

constexpr int64_t BLOCK = 1024;  // columns that stay in the first-level cache between finding their maximum and exp
constexpr float LOWEST = -87.0f;  // exp of less is no normal number

// e^x for x <= 0, 0 below LOWEST.
DPH_INLINE float exp_negative(float x) { return x < LOWEST ? 0.0f : exp_of(x); }

// What one row has come to: sum of e^(x - largest), and of e^(x - largest) (x - largest).
struct State {
  float largest;
  float sum;
  float weighted;
  int64_t best;  // column of the tile where the block begins that brought the largest, or -1: before this tile
};

template <bool STATISTICS>
DPH_INLINE void add_block(State& state, const float* __restrict x, int64_t begin, int64_t size, bool start) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < size; ++i) largest = x[i] > largest ? x[i] : largest;
  if (start) {
    state = {largest, 0.0f, 0.0f, begin};
  } else if (largest > state.largest) {
    const float shift = state.largest - largest, factor = exp_negative(shift);
    // Where the factor is 0, what went before counts for nothing; the shift may then be infinite.
    state.weighted = factor > 0.0f ? factor * (state.weighted + shift * state.sum) : 0.0f;
    state.sum *= factor;
    state.largest = largest;
    state.best = begin;
  }
  const float origin = state.largest > -INFINITY ? state.largest : 0.0f;  // nothing but minus infinity (or NaN) so far
  float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < size; ++i) {
    const float shifted = x[i] - origin, e = exp_negative(shifted);
    sum += e;
    // A logit of minus infinity has no part in the entropy.
    if (STATISTICS) weighted += e * (shifted < LOWEST ? LOWEST : shifted);
  }
  state.sum += sum;
  state.weighted += weighted;
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
  if (STATISTICS && state.best >= 0) {
    int64_t column = state.best;
    while (column < tile.columns - 1 && !(x[column] == state.largest)) ++column;  // NaN: any column will do
    tile.best[row] = tile.first + column;
  }
  const int64_t target = tile.targets[row] - tile.first;
  if (target >= 0 && target < tile.columns) tile.logprobs[row] = x[target];
  tile.largest[row] = state.largest;
  tile.log_sum[row] = state.sum;
  if (STATISTICS) tile.entropy[row] = state.weighted;
  if (!tile.last) return;
  // The sum is at least 1, as it holds e^0, and the target's logit is not above the largest: never above 0.
  const float log_sum = logf(state.sum);
  tile.log_sum[row] = log_sum;
  tile.logprobs[row] = (tile.logprobs[row] - state.largest) - log_sum;
  if (STATISTICS) tile.entropy[row] = log_sum - state.weighted / state.sum;
}

}  // namespace

DPH_CLONES void linear_logprob_reduce_row(const LogprobTile& tile, int64_t row) {
  if (tile.best) {
    reduce<true>(tile, row);
  } else {
    reduce<false>(tile, row);
  }
}

DPH_CLONES void linear_logprob_gradient_row(const LogprobTile& tile, int64_t row) {
  float* __restrict x = tile.logits + row * tile.stride;
  const float largest = tile.largest[row], log_sum = tile.log_sum[row], upstream = tile.upstream[row];
  const int64_t target = tile.targets[row] - tile.first;
  const bool here = target >= 0 && target < tile.columns;
  const float logprob = here ? (x[target] - largest) - log_sum : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < tile.columns; ++i) {
    const float gradient = -upstream * exp_negative((x[i] - largest) - log_sum);
    x[i] = fabsf(gradient) < 1.17549435e-38f ? 0.0f : gradient;  // subnormal numbers slow the products down
  }
  if (here) x[target] = -upstream * expm1f(logprob);  // 1 - p without loss where p is near 1
}

void linear_logprob_reduce_cpu(const LogprobTile& tile, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tile.rows * tile.columns > 16384)
  for (int64_t row = 0; row < tile.rows; ++row) linear_logprob_reduce_row(tile, row);
}

void linear_logprob_gradient_cpu(const LogprobTile& tile, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tile.rows * tile.columns > 16384)
  for (int64_t row = 0; row < tile.rows; ++row) linear_logprob_gradient_row(tile, row);
}

void linear_logprob_both_cpu(const LogprobTile& tile, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tile.rows * tile.columns > 16384)
  for (int64_t row = 0; row < tile.rows; ++row) {
    linear_logprob_reduce_row(tile, row);
    linear_logprob_gradient_row(tile, row);
  }
}

}  // namespace dph
