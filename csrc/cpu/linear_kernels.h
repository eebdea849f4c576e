// Products of rows with weights for one instruction set (each_instruction_set.h).
//
// Vector lanes are columns of x and of the weights, both of which are read in their original layout: every weight comes
// from memory once for a block of rows of x, which stays in the cache.

#define DPH_FN DPH_TARGET static inline __attribute__((always_inline))

constexpr int64_t W = DPH_LANES;
constexpr int64_t MR = 4, NR = DPH_LANES == 16 ? 4 : 2;  // a tile of the result: its sums and inputs fit the registers
constexpr int64_t AHEAD = 16 * W;                        // columns of a row of weights that are fetched ahead

typedef float Vec __attribute__((vector_size(4 * DPH_LANES)));
typedef float Loose __attribute__((vector_size(4 * DPH_LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * DPH_LANES), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * DPH_LANES)));

DPH_FN Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
DPH_FN Vec load(const uint16_t* bf16) {
  const Bits bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(bf16), Bits) << 16;
  return reinterpret_cast<Vec>(bits);
}
#include "lane_sum.h"

DPH_FN float value(float x) { return x; }
DPH_FN float value(uint16_t bf16) { return float_from_bf16(bf16); }

// The M by N results of M rows of x and N rows of weights.
template <int M, int N, class T>
DPH_FN void tile(const LinearArguments& a, int64_t row, int64_t column) {
  const float* const x = a.x + row * a.x_row;
  const T* const weight = static_cast<const T*>(a.weight) + column * a.weight_row;
  Vec sums[M][N] = {};
  int64_t k = 0;
  for (; k + W <= a.depth; k += W) {
    Vec w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      w[n] = load(weight + n * a.weight_row + k);
      __builtin_prefetch(weight + n * a.weight_row + k + AHEAD);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec of_row = load(x + m * a.x_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += of_row * w[n];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float total = sum(sums[m][n]);
      for (int64_t j = k; j < a.depth; ++j) total += x[m * a.x_row + j] * value(weight[n * a.weight_row + j]);
      a.out[(row + m) * a.out_row + column + n] = a.bias ? total + a.bias[column + n] : total;
    }
  }
}

template <int N, class T>
DPH_FN void strip(const LinearArguments& a, int64_t first, int64_t last, int64_t column) {
  int64_t row = first;
  for (; row + MR <= last; row += MR) tile<MR, N, T>(a, row, column);
  for (; row < last; ++row) tile<1, N, T>(a, row, column);
}

template <class T>
DPH_FN void block(const LinearArguments& a, int64_t first, int64_t last, int64_t column, int64_t end) {
  for (; column + NR <= end; column += NR) strip<NR, T>(a, first, last, column);
  for (; column < end; ++column) strip<1, T>(a, first, last, column);
}

// Results of rows [first, last) and columns [column, end).
DPH_TARGET inline void linear_block(const LinearArguments& a, int64_t first, int64_t last, int64_t column, int64_t end) {
  a.bf16 ? block<uint16_t>(a, first, last, column, end) : block<float>(a, first, last, column, end);
}

#undef DPH_FN
