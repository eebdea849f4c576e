// Residual connection and LayerNorm on the CPU: parallel loops over rows, which stay in the L1 cache between the passes
// over them. Partial sums are over fixed chunks of rows, so results do not depend on the number of threads.
#include "../residual_norm.h"
#include "instruction_sets.h"

#include <math.h>

#include <algorithm>
#include <memory>

namespace dph {
namespace {

constexpr int64_t LEAST_ROWS = 16;   // minimum rows per chunk
constexpr int64_t MOST_CHUNKS = 64;  // limits the cost of adding the partial sums
constexpr int64_t BLOCK = 256;       // columns that a thread reduces at a time
constexpr int64_t SMALL = 16384;     // elements up to which a second thread does not pay off

int64_t chunk_rows(int64_t rows) { return std::max(LEAST_ROWS, (rows + MOST_CHUNKS - 1) / MOST_CHUNKS); }
int64_t chunk_count(int64_t rows) { return (rows + chunk_rows(rows) - 1) / chunk_rows(rows); }

DPH_INLINE float get(float value) { return value; }
DPH_INLINE float get(uint16_t value) { return float_from_bf16(value); }
DPH_INLINE void put(float& place, float value) { place = value; }
DPH_INLINE void put(uint16_t& place, float value) { place = bf16_from_float(value); }

template <class T>
DPH_INLINE T* at(const NormRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.row;
}

template <class T, bool UPDATE, bool BIAS>
DPH_INLINE void forward_row(const ResidualNorm& a, int64_t row) {
  const int64_t size = a.columns;
  T* __restrict total = at<T>(a.total, row);
  float sum = 0.0f;
  if (UPDATE) {
    const T* __restrict x = at<T>(a.x, row);
    const T* __restrict update = at<T>(a.update, row);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
      put(total[i], get(x[i]) + get(update[i]));
      sum += get(total[i]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += get(total[i]);
  }
  const float mean = sum / size;
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) {
    const float centred = get(total[i]) - mean;
    squares += centred * centred;
  }
  const float rstd = 1.0f / sqrtf(squares / size + a.eps);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const T* __restrict bias = static_cast<const T*>(a.bias);
  T* __restrict normed = at<T>(a.normed, row);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float value = (get(total[i]) - mean) * rstd * get(weight[i]);
    put(normed[i], BIAS ? value + get(bias[i]) : value);
  }
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class T, bool SUMS, bool SKIP>
DPH_INLINE void backward_row(const ResidualNorm& a, int64_t row, float* __restrict to_weight,
                             float* __restrict to_bias) {
  const int64_t size = a.columns;
  const T* __restrict total = at<T>(a.total, row);
  const T* __restrict d_normed = at<T>(a.d_normed, row);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const float mean = a.mean[row], rstd = a.rstd[row];
  float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < size; ++i) {
    const float grad = get(d_normed[i]), normed = (get(total[i]) - mean) * rstd, g = grad * get(weight[i]);
    sum += g;
    product += g * normed;
    if (SUMS) {
      to_weight[i] += grad * normed;
      to_bias[i] += grad;
    }
  }
  if (!a.d_x.data) return;
  const float flat = sum / size, slope = product / size;
  const T* __restrict d_total = at<T>(a.d_total, SKIP ? row : 0);
  T* __restrict d_x = at<T>(a.d_x, row);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float normed = (get(total[i]) - mean) * rstd;
    const float value = (get(d_normed[i]) * get(weight[i]) - flat - normed * slope) * rstd;
    put(d_x[i], SKIP ? get(d_total[i]) + value : value);
  }
}

template <class T, bool SKIP>
DPH_INLINE void backward_chunk(const ResidualNorm& a, int64_t chunk, float* partials) {
  const int64_t size = chunk_rows(a.rows), end = std::min(a.rows, (chunk + 1) * size);
  float* sums = partials ? partials + chunk * 2 * a.columns : nullptr;
  if (sums) std::fill(sums, sums + 2 * a.columns, 0.0f);
  for (int64_t row = chunk * size; row < end; ++row) {
    if (sums) {
      backward_row<T, true, SKIP>(a, row, sums, sums + a.columns);
    } else {
      backward_row<T, false, SKIP>(a, row, nullptr, nullptr);
    }
  }
}

DPH_INLINE void forward(const ResidualNorm& a, int64_t row) {
  switch ((a.bf16 ? 4 : 0) + (a.update.data ? 2 : 0) + (a.bias ? 1 : 0)) {
    case 0: return forward_row<float, false, false>(a, row);
    case 1: return forward_row<float, false, true>(a, row);
    case 2: return forward_row<float, true, false>(a, row);
    case 3: return forward_row<float, true, true>(a, row);
    case 4: return forward_row<uint16_t, false, false>(a, row);
    case 5: return forward_row<uint16_t, false, true>(a, row);
    case 6: return forward_row<uint16_t, true, false>(a, row);
    default: return forward_row<uint16_t, true, true>(a, row);
  }
}

// ``partials`` [chunks, 2, columns], or null: sums over the rows of each chunk, for the gradients of weight and bias.
DPH_INLINE void backward(const ResidualNorm& a, int64_t chunk, float* partials) {
  switch ((a.bf16 ? 2 : 0) + (a.d_total.data ? 1 : 0)) {
    case 0: return backward_chunk<float, false>(a, chunk, partials);
    case 1: return backward_chunk<float, true>(a, chunk, partials);
    case 2: return backward_chunk<uint16_t, false>(a, chunk, partials);
    default: return backward_chunk<uint16_t, true>(a, chunk, partials);
  }
}

// Both passes, instantiated for every instruction set.
#define DPH_PASSES(target, name)                                                      \
  target void name##_forward(const ResidualNorm& a, int64_t row) { forward(a, row); } \
  target void name##_backward(const ResidualNorm& a, int64_t chunk, float* partials) { backward(a, chunk, partials); }
DPH_PASSES(, baseline)
#ifdef DPH_X86
DPH_PASSES(DPH_AVX2, avx2)
DPH_PASSES(DPH_AVX512, avx512)
#endif
#undef DPH_PASSES

struct Passes {
  void (*forward)(const ResidualNorm&, int64_t);
  void (*backward)(const ResidualNorm&, int64_t, float*);
};

Passes pick() {
#ifdef DPH_X86
  if (vector_floats() == 16) return {avx512_forward, avx512_backward};
  if (vector_floats() == 8) return {avx2_forward, avx2_backward};
#endif
  return {baseline_forward, baseline_backward};
}

const Passes passes = pick();

// result [columns] = partial sums added over all chunks, in order; ``partials`` points to those of the first chunk.
void add_up(const ResidualNorm& a, const float* partials, void* result, int threads) {
  const int64_t chunks = chunk_count(a.rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (chunks * a.columns > SMALL)
  for (int64_t begin = 0; begin < a.columns; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, a.columns - begin);
    float sums[BLOCK] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = partials + chunk * 2 * a.columns + begin;
      for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
    }
    for (int64_t i = 0; i < size; ++i) {
      if (a.bf16) {
        put(static_cast<uint16_t*>(result)[begin + i], sums[i]);
      } else {
        put(static_cast<float*>(result)[begin + i], sums[i]);
      }
    }
  }
}

}  // namespace

void residual_norm_forward_cpu(const ResidualNorm& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (a.rows * a.columns > SMALL)
  for (int64_t row = 0; row < a.rows; ++row) passes.forward(a, row);
}

void residual_norm_backward_cpu(const ResidualNorm& a, int threads) {
  const int64_t chunks = chunk_count(a.rows);
  const bool summed = a.d_weight || a.d_bias;
  const std::unique_ptr<float[]> partials(summed ? new float[chunks * 2 * a.columns] : nullptr);
#pragma omp parallel for schedule(static) num_threads(threads) if (a.rows * a.columns > SMALL)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) passes.backward(a, chunk, partials.get());
  if (a.d_weight) add_up(a, partials.get(), a.d_weight, threads);
  if (a.d_bias) add_up(a, partials.get() + a.columns, a.d_bias, threads);
}

}  // namespace dph
