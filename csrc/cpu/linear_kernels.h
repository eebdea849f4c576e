// Products of rows with weights for one instruction set (each_instruction_set.h).
//
// Of large weights the vector lanes are columns of x and of the weights, both of which are read in their original layout:
// every weight comes from memory once for a block of rows of x, which stays in the cache. Of small ones, which are in a
// cache anyway and whose rows may be short, the lanes are rows of the weights, which are transposed first.

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
#include "transpose.h"

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

// Small weights

constexpr int64_t SPAN = 2 * W;                  // columns of a tile
constexpr int64_t MANY = DPH_LANES == 16 ? 12 : 6;  // rows of a tile

// packed [depth, SPAN] becomes the transpose of ``count`` rows of weights from ``column`` on, and zeros.
template <class T>
DPH_FN void pack(float* packed, const LinearArguments& a, int64_t column, int64_t count) {
  const T* const weight = static_cast<const T*>(a.weight) + column * a.weight_row;
  for (int64_t first = 0; first < SPAN; first += W) {
    int64_t k = 0;
    for (; k + W <= a.depth; k += W) {
      Vec rows[W];
      for (int64_t n = 0; n < W; ++n) {
        rows[n] = first + n < count ? load(weight + (first + n) * a.weight_row + k) : Vec{};
      }
      turn(rows);
      for (int64_t l = 0; l < W; ++l) *reinterpret_cast<Loose*>(packed + (k + l) * SPAN + first) = rows[l];
    }
    for (; k < a.depth; ++k) {
      for (int64_t n = first; n < first + W; ++n) {
        packed[k * SPAN + n] = n < count ? value(weight[n * a.weight_row + k]) : 0.0f;
      }
    }
  }
}

// The results of M rows of x and ``count`` columns.
template <int M>
DPH_FN void packed_tile(const LinearArguments& a, const float* packed, int64_t row, int64_t column, int64_t count) {
  const float* const x = a.x + row * a.x_row;
  Vec sums[M][2] = {};
  for (int64_t k = 0; k < a.depth; ++k) {
    const Vec low = load(packed + k * SPAN), high = load(packed + k * SPAN + W);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const float of_row = x[m * a.x_row + k];
      sums[m][0] += of_row * low;
      sums[m][1] += of_row * high;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float results[SPAN];
    memcpy(results, sums[m], sizeof results);
    float* const out = a.out + (row + m) * a.out_row + column;
    if (a.bias) {
      for (int64_t n = 0; n < count; ++n) out[n] = results[n] + a.bias[column + n];
    } else {
      memcpy(out, results, count * sizeof(float));
    }
  }
}

template <class T>
DPH_FN void packed_rows(const LinearArguments& a, float* packed, int64_t first, int64_t last, int64_t column,
                        int64_t count) {
  pack<T>(packed, a, column, count);
  int64_t row = first;
  for (; row + MANY <= last; row += MANY) packed_tile<MANY>(a, packed, row, column, count);
  for (; row + 4 <= last; row += 4) packed_tile<4>(a, packed, row, column, count);
  for (; row < last; ++row) packed_tile<1>(a, packed, row, column, count);
}

// Results of rows [first, last) and at most SPAN columns from ``column`` on; ``packed`` has depth * SPAN floats.
DPH_TARGET inline void linear_packed(const LinearArguments& a, float* packed, int64_t first, int64_t last,
                                     int64_t column) {
  const int64_t count = a.columns - column < SPAN ? a.columns - column : SPAN;
  a.bf16 ? packed_rows<uint16_t>(a, packed, first, last, column, count)
         : packed_rows<float>(a, packed, first, last, column, count);
}

#undef DPH_FN
