// Residual connection and LayerNorm or RMSNorm on the CPU: parallel loops over rows, which stay in the L1 cache between
// the passes over them. Partial sums are over fixed chunks of rows, so results do not depend on the number of threads.
#include "../residual_norm.h"
#include "instruction_sets.h"
#include "threads.h"

#include <math.h>

#include <algorithm>
#include <memory>

namespace dph {
namespace {

constexpr int64_t LEAST_ROWS = 16;   // minimum rows per chunk
constexpr int64_t MOST_CHUNKS = 64;  // limits the cost of adding the partial sums
constexpr int64_t BLOCK = 256;       // columns that a thread reduces at a time
constexpr int64_t FEW = 4096;        // partial sums that are kept on the stack
constexpr int64_t SMALL = 32768;     // elements up to which a second thread does not pay off

int64_t chunk_rows(int64_t rows) { return std::max(LEAST_ROWS, (rows + MOST_CHUNKS - 1) / MOST_CHUNKS); }
int64_t chunk_count(int64_t rows) { return (rows + chunk_rows(rows) - 1) / chunk_rows(rows); }

DPH_INLINE float get(float value) { return value; }
DPH_INLINE float get(uint16_t value) { return float_from_bf16(value); }
DPH_INLINE void put(float& place, float value) { place = value; }
DPH_INLINE void put(uint16_t& place, float value) { place = bf16_from_float(value); }

// A row of all tensors, which may have different strides.
struct Row {
  int64_t heads, index, token, head;

  DPH_INLINE Row(int64_t heads, int64_t index)
      : heads(heads), index(index), token(index / heads), head(index % heads) {}

  DPH_INLINE void next() {  // a division would take as long as a short row
    ++index;
    if (++head == heads) head = 0, ++token;
  }
};

template <class T>
DPH_INLINE T* at(const NormRows& rows, const Row& row) {
  return static_cast<T*>(rows.data) + row.token * rows.token + row.head * rows.head;
}

// Sum of term(i) over [0, size), of its halves at once: each addition waits for the one before it.
template <class Term>
DPH_INLINE float sum_of(int64_t size, const Term& term) {
  const int64_t half = size / 32 * 16;
  float first = 0.0f, second = 0.0f, rest = 0.0f;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < half; ++i) {
    first += term(i);
    second += term(i + half);
  }
#pragma omp simd reduction(+ : rest)
  for (int64_t i = 2 * half; i < size; ++i) rest += term(i);
  return (first + second) + rest;
}

template <class T, bool RMS, bool UPDATE, bool BIAS>
DPH_INLINE void forward_row(const ResidualNorm& a, const Row& row) {
  const int64_t size = a.columns;
  T* __restrict total = at<T>(a.total, row);
  float sum = 0.0f;  // of squares if RMS
  if (UPDATE) {
    const T* __restrict x = at<T>(a.x, row);
    const T* __restrict update = at<T>(a.update, row);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
      put(total[i], get(x[i]) + get(update[i]));
      sum += RMS ? get(total[i]) * get(total[i]) : get(total[i]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += RMS ? get(total[i]) * get(total[i]) : get(total[i]);
  }
  const float mean = RMS ? 0.0f : sum / size;
  float squares = sum;
  if (!RMS) {
    squares = sum_of(size, [=](int64_t i) __attribute__((always_inline)) {
      const float centred = get(total[i]) - mean;
      return centred * centred;
    });
  }
  const float rstd = 1.0f / sqrtf(squares / size + a.eps);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const T* __restrict bias = static_cast<const T*>(a.bias);
  T* __restrict normed = at<T>(a.normed, row);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float centred = RMS ? get(total[i]) : get(total[i]) - mean;
    const float value = centred * rstd * get(weight[i]);
    put(normed[i], BIAS ? value + get(bias[i]) : value);
  }
  if (!a.rstd) return;
  if (!RMS) a.mean[row.index] = mean;
  a.rstd[row.index] = rstd;
}

template <class T, bool RMS, bool SUMS, bool SKIP>
DPH_INLINE void backward_row(const ResidualNorm& a, const Row& row, float* __restrict to_weight,
                             float* __restrict to_bias) {
  const int64_t size = a.columns;
  const T* __restrict total = at<T>(a.total, row);
  const T* __restrict d_normed = at<T>(a.d_normed, row);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const float mean = RMS ? 0.0f : a.mean[row.index], rstd = a.rstd[row.index];
  float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < size; ++i) {
    const float centred = RMS ? get(total[i]) : get(total[i]) - mean;
    const float grad = get(d_normed[i]), normed = centred * rstd, g = grad * get(weight[i]);
    if (!RMS) sum += g;
    product += g * normed;
    if (SUMS) {
      to_weight[i] += grad * normed;
      if (!RMS) to_bias[i] += grad;
    }
  }
  if (!a.d_x.data) return;
  const float flat = sum / size, slope = product / size;
  const T* __restrict d_total = SKIP ? at<T>(a.d_total, row) : nullptr;
  T* __restrict d_x = at<T>(a.d_x, row);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float normed = (RMS ? get(total[i]) : get(total[i]) - mean) * rstd;
    const float g = get(d_normed[i]) * get(weight[i]);
    const float value = ((RMS ? g : g - flat) - normed * slope) * rstd;
    put(d_x[i], SKIP ? get(d_total[i]) + value : value);
  }
}

// Rows ``begin`` to ``end``.
template <class T, bool RMS, bool UPDATE, bool BIAS>
DPH_INLINE void forward_rows(const ResidualNorm& a, int64_t begin, int64_t end) {
  for (Row row(a.heads, begin); row.index < end; row.next()) forward_row<T, RMS, UPDATE, BIAS>(a, row);
}

template <class T, bool RMS, bool SUMS, bool SKIP>
DPH_INLINE void backward_rows(const ResidualNorm& a, int64_t begin, int64_t end, float* sums) {
  for (Row row(a.heads, begin); row.index < end; row.next()) {
    backward_row<T, RMS, SUMS, SKIP>(a, row, sums, SUMS ? sums + a.columns : nullptr);
  }
}

template <class T>
DPH_INLINE void forward(const ResidualNorm& a, int64_t begin, int64_t end) {
  switch ((a.rms ? 4 : 0) + (a.update.data ? 2 : 0) + (a.bias ? 1 : 0)) {
    case 0: return forward_rows<T, false, false, false>(a, begin, end);
    case 1: return forward_rows<T, false, false, true>(a, begin, end);
    case 2: return forward_rows<T, false, true, false>(a, begin, end);
    case 3: return forward_rows<T, false, true, true>(a, begin, end);
    case 4: return forward_rows<T, true, false, false>(a, begin, end);
    default: return forward_rows<T, true, true, false>(a, begin, end);
  }
}

template <class T>
DPH_INLINE void backward(const ResidualNorm& a, int64_t begin, int64_t end, float* sums) {
  switch ((a.rms ? 4 : 0) + (sums ? 2 : 0) + (a.d_total.data ? 1 : 0)) {
    case 0: return backward_rows<T, false, false, false>(a, begin, end, sums);
    case 1: return backward_rows<T, false, false, true>(a, begin, end, sums);
    case 2: return backward_rows<T, false, true, false>(a, begin, end, sums);
    case 3: return backward_rows<T, false, true, true>(a, begin, end, sums);
    case 4: return backward_rows<T, true, false, false>(a, begin, end, sums);
    case 5: return backward_rows<T, true, false, true>(a, begin, end, sums);
    case 6: return backward_rows<T, true, true, false>(a, begin, end, sums);
    default: return backward_rows<T, true, true, true>(a, begin, end, sums);
  }
}

DPH_INLINE void run_forward(const ResidualNorm& a, int64_t begin, int64_t end) {
  return a.bf16 ? forward<uint16_t>(a, begin, end) : forward<float>(a, begin, end);
}

// ``sums`` [sum_count], or null: sums over the rows, for the gradients of weight and bias.
DPH_INLINE void run_backward(const ResidualNorm& a, int64_t begin, int64_t end, float* sums) {
  return a.bf16 ? backward<uint16_t>(a, begin, end, sums) : backward<float>(a, begin, end, sums);
}

// Both passes, instantiated for every instruction set.
#define DPH_PASSES(target, name)                                                                                \
  target void name##_forward(const ResidualNorm& a, int64_t begin, int64_t end) { run_forward(a, begin, end); } \
  target void name##_backward(const ResidualNorm& a, int64_t begin, int64_t end, float* sums) {                 \
    run_backward(a, begin, end, sums);                                                                          \
  }
DPH_PASSES(, baseline)
#ifdef DPH_X86
DPH_PASSES(DPH_AVX2, avx2)
DPH_PASSES(DPH_AVX512, avx512)
#endif
#undef DPH_PASSES

struct Passes {
  int lanes;
  void (*forward)(const ResidualNorm&, int64_t, int64_t);
  void (*backward)(const ResidualNorm&, int64_t, int64_t, float*);
};

Passes pick(int most) {
#ifdef DPH_X86
  const int lanes = vector_floats(most);
  if (lanes == 16) return {16, avx512_forward, avx512_backward};
  if (lanes == 8) return {8, avx2_forward, avx2_backward};
#endif
  return {4, baseline_forward, baseline_backward};
}

Passes passes = pick(16);

// Partial sums of a chunk: [columns] for the weight, then for the bias unless rms.
int64_t sum_count(const ResidualNorm& a) { return (a.rms ? 1 : 2) * a.columns; }

// result [columns] = partial sums added over all chunks, in order; ``partials`` points to those of the first chunk.
void add_up(const ResidualNorm& a, const float* partials, void* result, int threads) {
  const int64_t chunks = chunk_count(a.rows), blocks = (a.columns + BLOCK - 1) / BLOCK;
  for_each(blocks, threads, chunks * a.columns > SMALL, [&](int64_t block) {
    const int64_t begin = block * BLOCK, size = std::min(BLOCK, a.columns - begin);
    float sums[BLOCK] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = partials + chunk * sum_count(a) + begin;
      for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
    }
    for (int64_t i = 0; i < size; ++i) {
      if (a.bf16) {
        put(static_cast<uint16_t*>(result)[begin + i], sums[i]);
      } else {
        put(static_cast<float*>(result)[begin + i], sums[i]);
      }
    }
  });
}

}  // namespace

int residual_norm_lanes(int most) {
  passes = pick(most);
  return passes.lanes;
}

void residual_norm_forward_cpu(const ResidualNorm& a, int threads) {
  if (!a.rows) return;
  if (a.rows * a.columns <= SMALL) threads = 1;
  for_each(threads, threads, true, [&](int64_t part) {
    passes.forward(a, a.rows * part / threads, a.rows * (part + 1) / threads);
  });
}

void residual_norm_backward_cpu(const ResidualNorm& a, int threads) {
  const int64_t chunks = chunk_count(a.rows), size = chunk_rows(a.rows), count = sum_count(a);
  const bool summed = a.d_weight || a.d_bias;
  float few[FEW];
  const std::unique_ptr<float[]> many(summed && chunks * count > FEW ? new float[chunks * count] : nullptr);
  float* const partials = many ? many.get() : few;
  for_each(chunks, threads, a.rows * a.columns > SMALL, [&](int64_t chunk) {
    float* sums = summed ? partials + chunk * count : nullptr;
    if (sums) std::fill(sums, sums + count, 0.0f);
    passes.backward(a, chunk * size, std::min(a.rows, (chunk + 1) * size), sums);
  });
  if (a.d_weight) add_up(a, partials, a.d_weight, threads);
  if (a.d_bias) add_up(a, partials + a.columns, a.d_bias, threads);
}

}  // namespace dph
