// Products for few answers on one instruction set. swiglu_reward_kernels.h includes this file in the namespace of the
// instruction set; hence there is no include guard.
//
// Vector lanes are features: weights are loaded as vectors, not broadcast, and multiplied by job.lanes answers
// (adjacent in memory), whereas ``product`` multiplies each weight by a whole vector of answers. Results are
// bit-identical to those of ``product``.

// Like Loose, but with the alignment of 16-bit elements.
typedef float Anywhere __attribute__((vector_size(4 * DPH_LANES), aligned(2), may_alias));

#include "transpose.h"

// Loads W 32-bit words (one float or two bf16 each) from each of W rows, starting at column k. Row addresses are
// computed from every fourth row and three multiples of the stride: sixteen addresses would not fit the registers.
template <class Element>
DPH_FN void load_rows(Vec* words, const Element* const* fourths, int64_t ld, int64_t k) {
  constexpr int64_t ahead = 256 / sizeof(Element);  // prefetch distance in elements
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    const Element* from = fourths[r / 4] + r % 4 * ld + k;
    __builtin_prefetch(from + ahead);
    words[r] = *reinterpret_cast<const Anywhere*>(from);
  }
}

// Element ``place`` of each word, as float.
template <class Element>
DPH_FN Vec element(Vec words, int place) {
  if (sizeof(Element) == sizeof(float)) return words;
  constexpr bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  const Words bits = reinterpret_cast<Words>(words);
  return reinterpret_cast<Vec>((place == 1) == little_endian ? bits & 0xffff0000u : bits << 16);
}

// sums [G, N, W] = G groups of W rows of a matrix with row stride ``ld``, times N answers. The sums of one group are one
// chain of additions for each answer; with few answers a second group fills the time in which these wait.
template <class Element, int N, int G>
DPH_FN void multiply_few(float* sums, const Element* const* groups, int64_t ld, const Panels& answers) {
  constexpr int places = sizeof(float) / sizeof(Element);
  constexpr int64_t tile = W * places;
  const Element* fourths[G][W / 4];
  for (int g = 0; g < G; ++g) {
    for (int i = 0; i < W / 4; ++i) fourths[g][i] = groups[g] + 4 * i * ld;
  }
  Vec total[G][N] = {};
  for (int64_t begin = 0; begin < answers.features; begin += DEPTH) {
    const int64_t end = std::min(begin + DEPTH, answers.features), whole = end / tile * tile;
    const float* b = answers.row(begin, 0);
    Vec acc[G][N] = {};
    for (int64_t k = begin; k < whole; k += tile, b += tile * N) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        Vec words[W];
        load_rows(words, fourths[g], ld, k);
        turn(words);
#pragma GCC unroll 32
        for (int d = 0; d < tile; ++d) {
          const Vec a = element<Element>(words[d / places], d % places);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) acc[g][n] += a * (b[d * N + n] - Vec{});
        }
      }
    }
    for (int64_t k = whole; k < end; ++k, b += N) {
      for (int g = 0; g < G; ++g) {
        Vec a;
        for (int r = 0; r < W; ++r) a[r] = value(groups[g][r * ld + k]);
        for (int n = 0; n < N; ++n) acc[g][n] += a * (b[n] - Vec{});
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int n = 0; n < N; ++n) total[g][n] += acc[g][n];
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int n = 0; n < N; ++n) store(sums + (g * N + n) * W, total[g][n]);
  }
}

template <class Element, int N, int G>
DPH_FN void multiply_few(float* sums, const RewardMatrix& weights, const int64_t* first, const Panels& answers) {
  const Element* groups[G];
  for (int g = 0; g < G; ++g) groups[g] = static_cast<const Element*>(weights.data) + first[g] * weights.row;
  if (N <= 2) {  // the registers hold all sums
    multiply_few<Element, N, G>(sums, groups, weights.row, answers);
  } else {
    for (int g = 0; g < G; ++g) multiply_few<Element, N, 1>(sums + g * N * W, groups + g, weights.row, answers);
  }
}

template <class Element, int G>
DPH_FN void multiply_few(float* sums, const RewardMatrix& weights, const int64_t* first, const Panels& answers) {
  if (answers.lanes == 1) {
    multiply_few<Element, 1, G>(sums, weights, first, answers);
  } else if (answers.lanes == 2) {
    multiply_few<Element, 2, G>(sums, weights, first, answers);
  } else if (answers.lanes == 4) {
    multiply_few<Element, 4, G>(sums, weights, first, answers);
  } else {
    static_assert(FEW == 8, "few_lanes gives 1, 2, 4 or FEW");
    multiply_few<Element, FEW, G>(sums, weights, first, answers);
  }
}

// sums [G, N, W] = features [first[g], first[g] + W) of the answers times the weights, plus the bias.
template <int G>
DPH_FN void project_few(float* sums, const RewardMatrix& weights, const RewardMatrix& bias, bool bf16,
                        const int64_t* first, const Panels& answers) {
  if (bf16) {
    multiply_few<uint16_t, G>(sums, weights, first, answers);
  } else {
    multiply_few<float, G>(sums, weights, first, answers);
  }
  for (int g = 0; bias.data && g < G; ++g, sums += answers.lanes * W) {
    for (int64_t l = 0; l < W; ++l) {
      const float own = get(bias, first[g] + l, 0, bf16);
      for (int64_t n = 0; n < answers.lanes; ++n) sums[n * W + l] += own;
    }
  }
}

// The first ``count`` elements of a vector, and zeros.
template <class Element>
DPH_FN Vec first(const Element* from, int64_t count) {
  Vec values = {};
  for (int64_t l = 0; l < count; ++l) values[l] = value(from[l]);
  return values;
}

// Adds to acc [N, FEW_SPAN] ROWS rows of ``count`` weights times the gradients of N answers, one row after the other.
template <class Element, int N, int ROWS>
DPH_FN void add_rows(float* acc, const Element* rows, int64_t ld, int64_t count, const float* grads, int64_t step) {
  Vec factors[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) factors[r][n] = grads[r * step + n] - Vec{};
  }
  for (int64_t c = 0; c < count; c += W) {
    Vec w[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) w[r] = c + W <= count ? load(rows + r * ld + c) : first(rows + r * ld + c, count - c);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vec sum = load(acc + n * FEW_SPAN + c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum += w[r] * factors[r][n];
      store(acc + n * FEW_SPAN + c, sum);
    }
  }
}

// Sums [N, FEW_SPAN], which are returned: columns [first, first + count) of the weights times the gradients of N answers.
// It sums over the rows, DEPTH at a time as ``product`` does, and reads each from end to end. ``buffer`` holds twice the
// result.
template <class Element, int N>
DPH_FN const float* combine_rows(const RewardMatrix& weights, int64_t first, int64_t count, const Panels& grads,
                                 float* buffer) {
  float *acc = buffer, *total = buffer + N * FEW_SPAN;
  const Element* data = static_cast<const Element*>(weights.data) + first;
  const int64_t step = grads.width(0);
  for (int64_t begin = 0; begin < grads.features; begin += DEPTH) {
    const int64_t end = std::min(begin + DEPTH, grads.features);
    memset(acc, 0, N * FEW_SPAN * sizeof(float));
    int64_t k = begin;
    constexpr int ROWS = N <= 2 && W == 16 ? 8 : 4;  // their factors fill the registers
    for (; k + ROWS <= end; k += ROWS) {
      add_rows<Element, N, ROWS>(acc, data + k * weights.row, weights.row, count, grads.row(k, 0), step);
    }
    for (; k < end; ++k) {
      add_rows<Element, N, 1>(acc, data + k * weights.row, weights.row, count, grads.row(k, 0), step);
    }
    for (int n = 0; n < N; ++n) {
      float *sum = total + n * FEW_SPAN, *part = acc + n * FEW_SPAN;
      for (int64_t c = 0; c < count; ++c) sum[c] = begin ? sum[c] + part[c] : part[c];
    }
  }
  return total;
}

template <class Element>
DPH_FN const float* combine_rows(const RewardMatrix& weights, int64_t first, int64_t count, const Panels& grads,
                                 float* buffer) {
  if (grads.lanes == 1) return combine_rows<Element, 1>(weights, first, count, grads, buffer);
  if (grads.lanes == 2) return combine_rows<Element, 2>(weights, first, count, grads, buffer);
  if (grads.lanes == 4) return combine_rows<Element, 4>(weights, first, count, grads, buffer);
  return combine_rows<Element, FEW>(weights, first, count, grads, buffer);
}

DPH_TARGET static const float* combine_few(const Job& job, const RewardMatrix& weights, int64_t first, int64_t count,
                                           const Panels& grads, Scratch& s) {
  return job.a.bf16 ? combine_rows<uint16_t>(weights, first, count, grads, s.packed.get())
                    : combine_rows<float>(weights, first, count, grads, s.packed.get());
}

// Rows [first, first + count) of a weight gradient [.., columns]: products of features of ``left`` and ``right``, summed
// over the N answers. Rows are written from end to end, four at a time.
template <class Element, int N>
DPH_FN void outer_few(Element* out, const Panels& left, const Panels& right, int64_t first, int64_t count,
                      int64_t columns) {
  constexpr int ROWS = 1;
  for (int64_t i = 0; i < count; i += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, count - i);
    float factors[ROWS][N] = {};
    for (int64_t r = 0; r < rows; ++r) memcpy(factors[r], left.row(first + i + r, 0), N * sizeof(float));
    Element* to = out + (first + i) * columns;
    for (int64_t c = 0; c < columns; c += W) {
      const float* features = right.row(0, c);
      const int64_t step = right.width(c);
      Vec sums[ROWS] = {};
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vec b = load(features + n * step);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r] += factors[r][n] * b;
      }
      const int64_t filled = std::min(W, columns - c);
      for (int64_t r = 0; r < rows; ++r) {
        if (sizeof(Element) == sizeof(float) && filled == W) {
          store(reinterpret_cast<float*>(to + r * columns + c), sums[r]);
          continue;
        }
        for (int64_t l = 0; l < filled; ++l) put(to, r * columns + c + l, sums[r][l], sizeof(Element) == 2);
      }
    }
  }
}

template <class Element>
DPH_FN void outer_few(Element* out, const Panels& left, const Panels& right, int64_t first, int64_t count,
                      int64_t columns) {
  if (right.features == 1) {
    outer_few<Element, 1>(out, left, right, first, count, columns);
  } else {
    outer_few<Element, 2>(out, left, right, first, count, columns);
  }
}

// Saves lanes [from, W) of values [N, W] for the backward pass, as features [first + from, first + W), with zeros for
// the padding answers.
DPH_FN void keep_few(const Panels& kept, int64_t first, int64_t from, const float* values, int64_t answers) {
  for (int64_t l = from; l < W; ++l) {
    float* to = kept.row(first + l, 0);
    for (int64_t n = 0; n < kept.lanes; ++n) to[n] = n < answers ? values[n * W + l] : 0.0f;
  }
}

// x * silu(g) for one block of F. The last vector ends with the matrix, so its lanes may overlap the previous one.
DPH_TARGET inline void gate_few(const Job& job, int64_t block, Scratch&) {
  const SwigluRewardArguments& a = job.a;
  for (int64_t f = block * BLOCK; f < std::min((block + 1) * BLOCK, a.width); f += W) {
    const int64_t first = std::min(f, a.width - W);
    alignas(64) float both[2 * FEW * W];
    const int64_t rows[] = {first, a.width + first};
    project_few<2>(both, a.w1, a.b1, a.bf16, rows, job.hidden);
    float *xs = both, *gs = both + job.lanes * W;
    if (a.kept_projected) {
      keep_few(job.projected, first, f - first, xs, a.rows);
      keep_few(job.projected, a.width + first, f - first, gs, a.rows);
    }
    for (int64_t n = 0; n < job.lanes; ++n) {
      float *x = xs + n * W, *g = gs + n * W;
#pragma omp simd
      for (int64_t l = 0; l < W; ++l) x[l] = x[l] * (g[l] * sigmoid_of(g[l]));
      for (int64_t l = f - first; l < W; ++l) job.gated.row(first + l, 0)[n] = x[l];
    }
  }
}

// Contribution of one block of C to the rewards.
DPH_TARGET inline void reward_few(const Job& job, int64_t block, Scratch&) {
  const SwigluRewardArguments& a = job.a;
  float* parts = job.parts.get() + block * a.heads * job.lanes;
  memset(parts, 0, a.heads * job.lanes * sizeof(float));
  for (int64_t c = block * BLOCK; c < std::min((block + 1) * BLOCK, a.columns); c += W) {
    const int64_t first = std::min(c, a.columns - W);
    alignas(64) float states[FEW * W];
    project_few<1>(states, a.w2, a.b2, a.bf16, &first, a.width ? job.gated : job.hidden);
#pragma omp simd
    for (int64_t l = 0; l < job.lanes * W; ++l) states[l] = tanh_of(states[l]);
    if (a.kept_pooled) keep_few(job.pooled, first, c - first, states, a.rows);
    for (int64_t l = c - first; l < W; ++l) {
      float factors[FEW];
      draw(factors, job, a.pooled, first + l, 0, job.lanes);
      for (int64_t n = 0; n < job.lanes; ++n) {
        const float state = states[n * W + l] * factors[n];
        for (int64_t k = 0; k < a.heads; ++k) {
          parts[k * job.lanes + n] += job.reward.get()[k * a.columns + first + l] * state;
        }
      }
    }
  }
}

// Gradients of [x | g] and of b1 for job.span features of F; also recomputes x * silu(g).
DPH_TARGET inline void gate_backward_few(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t start = block * job.span, size = std::min(job.span, a.width - start);
  const Panels &dp = job.d_projected, &gated = job.gated_rows;
  const float* sums = dp.data ? combine_few(job, a.w2, start, size, job.d_pooled, s) : nullptr;
  for (int64_t c = 0; c < size; c += BLOCK) {
    const int64_t first = start + c, count = std::min(BLOCK, size - c);
    float x_sums[BLOCK] = {}, g_sums[BLOCK] = {};
    for (int64_t n = 0; n < a.rows; ++n) {
      alignas(64) float x[BLOCK] = {}, g[BLOCK] = {}, product[BLOCK];
      for (int64_t i = 0; i < count; ++i) {
        x[i] = job.projected.row(first + i, 0)[n];
        g[i] = job.projected.row(a.width + first + i, 0)[n];
      }
      if (!dp.data) {
#pragma omp simd
        for (int64_t i = 0; i < BLOCK; ++i) product[i] = x[i] * (g[i] * sigmoid_of(g[i]));
      } else {
        const float* d = sums + n * FEW_SPAN + c;
#pragma omp simd
        for (int64_t i = 0; i < BLOCK; ++i) {
          const float share = sigmoid_of(g[i]), dx = d[i] * (g[i] * share);
          product[i] = x[i] * (g[i] * share);
          g[i] = d[i] * x[i] * share * (1.0f + g[i] * (1.0f - share));
          x[i] = dx;
          x_sums[i] += dx;
          g_sums[i] += g[i];
        }
        for (int64_t i = 0; i < count; ++i) {
          dp.row(first + i, 0)[n] = x[i];
          dp.row(a.width + first + i, 0)[n] = g[i];
        }
      }
      if (gated.data) memcpy(gated.row(n, first), product, count * sizeof(float));
    }
    for (int64_t i = 0; dp.data && i < count; ++i) {
      for (int64_t n = a.rows; n < dp.lanes; ++n) dp.row(first + i, 0)[n] = dp.row(a.width + first + i, 0)[n] = 0.0f;
      if (!a.d_b1) continue;
      put(a.d_b1, first + i, x_sums[i], a.bf16);
      put(a.d_b1, a.width + first + i, g_sums[i], a.bf16);
    }
  }
}

// Gradient of job.span columns of hidden.
DPH_TARGET inline void hidden_backward_few(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * job.span, count = std::min(job.span, a.columns - first);
  const float* sums = a.width ? combine_few(job, a.w1, first, count, job.d_projected, s)
                              : combine_few(job, a.w2, first, count, job.d_pooled, s);
  for (int64_t c = 0; c < count; ++c) {
    float factors[FEW];
    draw(factors, job, a.input, first + c, 0, a.rows);
    for (int64_t n = 0; n < a.rows; ++n) {
      put(a.d_hidden, n * a.columns + first + c, sums[n * FEW_SPAN + c] * factors[n], a.bf16);
    }
  }
}
