// Pooler kernels for one instruction set. swiglu_reward.cpp includes this file once per instruction set, each time in a
// separate namespace, with DPH_TARGET (function attribute) and DPH_LANES (vector width in floats) defined; hence there
// is no include guard.
//
// Vector lanes are answers, i.e. rows of hidden (for few answers see swiglu_reward_few.h), and matrix rows are
// features, so that a weight matrix is the left factor of every product: it is read once, in its original layout, and
// its elements are broadcast. Features of an answer are summed in a fixed order, so that its rewards do not depend on
// the batch.

#define DPH_FN DPH_TARGET static inline __attribute__((always_inline))

constexpr int64_t W = DPH_LANES;
constexpr int64_t MR = W == 16 ? 8 : 4;  // rows of a micro-tile; times two vectors, the accumulators fill the registers

typedef float Vec __attribute__((vector_size(4 * DPH_LANES)));
typedef float Loose __attribute__((vector_size(4 * DPH_LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * DPH_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * DPH_LANES), aligned(2), may_alias));

DPH_FN Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
DPH_FN Vec load(const uint16_t* bf16) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(bf16), Words) << 16;
  return reinterpret_cast<Vec>(words);
}
DPH_FN void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

DPH_FN float value(float x) { return x; }
DPH_FN float value(uint16_t bf16) { return float_from_bf16(bf16); }

DPH_FN float get(const void* data, int64_t at, bool bf16) {
  return bf16 ? value(static_cast<const uint16_t*>(data)[at]) : static_cast<const float*>(data)[at];
}

DPH_FN float get(const RewardMatrix& m, int64_t i, int64_t j, bool bf16) {
  return get(m.data, i * m.row + j * m.column, bf16);
}

DPH_FN void put(void* data, int64_t at, float value, bool bf16) {
  if (bf16) {
    static_cast<uint16_t*>(data)[at] = bf16_from_float(value);
  } else {
    static_cast<float*>(data)[at] = value;
  }
}

#include "swiglu_reward_products.h"

// Element-wise functions of scalars; the compiler vectorises the loops over lanes that call them.

DPH_FN float tanh_of(float x) {
  const float size = x < 0.0f ? -x : x, square = x * x;
  float p = -5.70498872745e-3f;  // Cephes' tanhf, below 5/8
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * x + x;
  const float large = 1.0f - 2.0f / (1.0f + exp_of(2.0f * size));
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// Word 0 of Philox4x32-10 with key ``seed`` and counter (column, stream, row id): dph_kernels/philox.py.
DPH_FN uint32_t philox(uint64_t seed, uint32_t column, uint32_t stream, uint32_t row_low, uint32_t row_high) {
  uint32_t c0 = column, c1 = stream, c2 = row_low, c3 = row_high;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Dropout factors of one column for answers [row, row + count).
DPH_FN void draw(float* factors, const Job& job, const RewardDropout& dropout, int64_t column, int64_t row,
                 int64_t count) {
  const float kept = 1.0f / dropout.keep;
  if (dropout.threshold == 0) {
    for (int64_t l = 0; l < count; ++l) factors[l] = kept;
    return;
  }
  const uint32_t *low = job.row_low.get() + row, *high = job.row_high.get() + row;
  const uint32_t stream = dropout.stream, threshold = dropout.threshold, place = static_cast<uint32_t>(column);
  const uint64_t seed = job.a.seed;
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    factors[l] = philox(seed, place, stream, low[l], high[l]) >= threshold ? kept : 0.0f;
  }
}

#include "swiglu_reward_few.h"

// Stages. Each processes a block of BLOCK features for all answers, or of job.span if weights are read by columns.

// Loads columns [32 * block, ..) of the hidden states, times their dropout factors, with answers along the lanes.
DPH_TARGET inline void take_hidden(const Job& job, int64_t block, Scratch&) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * BLOCK, last = std::min(first + BLOCK, a.columns);
  for (int64_t j = 0; j < job.lanes; j += PANEL) {
    const int64_t width = job.width(j), filled = std::min(width, std::max<int64_t>(a.rows - j, 0));
    for (int64_t c = first; c < last; ++c) {
      float* to = job.hidden.row(c, j);
      for (int64_t l = 0; l < filled; ++l) to[l] = get(a.hidden, j + l, c, a.bf16);
      for (int64_t l = filled; l < width; ++l) to[l] = 0.0f;
      if (a.input.threshold == 0) continue;
      alignas(64) float factors[PANEL];
      draw(factors, job, a.input, c, j, width);
      for (int64_t l = 0; l < width; ++l) to[l] *= factors[l];
    }
  }
}

// Transposes columns [32 * block, ..) of the same to features along the lanes, as required by the weight gradients.
DPH_TARGET inline void turn_hidden(const Job& job, int64_t block, Scratch&) {
  const int64_t first = block * PANEL, width = job.hidden_rows.width(first);
  for (int64_t r = 0; r < job.a.rows; ++r) {
    float* to = job.hidden_rows.row(r, first);
    for (int64_t l = 0; l < width; ++l) to[l] = first + l < job.a.columns ? job.hidden.row(first + l, r)[0] : 0.0f;
  }
}

// Sets the values of one feature at the padding lanes of the panel at column j to 0. They are computed from zeros, but
// infinite weights make them NaN, which sums over all lanes must not include.
DPH_FN void clear_padding(const Job& job, float* values, int64_t j) {
  for (int64_t l = std::max<int64_t>(job.a.rows - j, 0); l < job.width(j); ++l) values[l] = 0.0f;
}

// Saves the values of one feature of the panel at column j for the backward pass.
DPH_FN void keep(const Job& job, float* kept, const float* values, int64_t j) {
  memcpy(kept, values, job.width(j) * sizeof(float));
  clear_padding(job, kept, j);
}

// x * silu(g) for one block of F.
DPH_TARGET inline void gate_block(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * BLOCK, count = std::min(BLOCK, a.width - first);
  const Left w1 = {a.w1.data, a.w1.row, a.w1.column, a.bf16, {}};
  float *xs = s.sums.get(), *gs = xs + BLOCK * CHUNK;
  for (int64_t begin = 0; begin < job.lanes; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, job.lanes);
    product(xs, CHUNK, w1, first, count, job.hidden, begin, end, s.packed.get());
    product(gs, CHUNK, w1, a.width + first, count, job.hidden, begin, end, s.packed.get());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t f = first + i;
      const float x_bias = a.b1.data ? get(a.b1, f, 0, a.bf16) : 0.0f;
      const float g_bias = a.b1.data ? get(a.b1, a.width + f, 0, a.bf16) : 0.0f;
      for (int64_t j = begin; j < end; j += PANEL) {
        float *x = xs + i * CHUNK + j - begin, *g = gs + i * CHUNK + j - begin, *to = job.gated.row(f, j);
        const int64_t width = job.width(j);
#pragma omp simd
        for (int64_t l = 0; l < width; ++l) {
          x[l] += x_bias;
          g[l] += g_bias;
          to[l] = x[l] * (g[l] * sigmoid_of(g[l]));
        }
        if (!a.kept_projected) continue;
        keep(job, job.projected.row(f, j), x, j);
        keep(job, job.projected.row(a.width + f, j), g, j);
      }
    }
  }
}

// Contribution of one block of C to the rewards: pooled state, dropout and dot product with each reward vector.
DPH_TARGET inline void reward_block(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * BLOCK, count = std::min(BLOCK, a.columns - first);
  const Left w2 = {a.w2.data, a.w2.row, a.w2.column, a.bf16, {}};
  float* parts = job.parts.get() + block * a.heads * job.lanes;
  memset(parts, 0, a.heads * job.lanes * sizeof(float));
  for (int64_t begin = 0; begin < job.lanes; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, job.lanes);
    float* sums = s.sums.get();
    const Panels& states = a.width ? job.gated : job.hidden;
    if (a.w2.data) product(sums, CHUNK, w2, first, count, states, begin, end, s.packed.get());
    for (int64_t i = 0; i < count; ++i) {
      const float bias = a.b2.data ? get(a.b2, first + i, 0, a.bf16) : 0.0f;
      for (int64_t j = begin; j < end; j += PANEL) {
        alignas(64) float state[PANEL], factors[PANEL];
        const int64_t width = job.width(j);
        if (a.w2.data) {
          const float* z = sums + i * CHUNK + j - begin;
#pragma omp simd
          for (int64_t l = 0; l < width; ++l) state[l] = tanh_of(z[l] + bias);
        } else {
          memcpy(state, job.hidden.row(first + i, j), width * sizeof(float));
        }
        if (a.kept_pooled) keep(job, job.pooled.row(first + i, j), state, j);
        draw(factors, job, a.pooled, first + i, j, width);
        for (int64_t l = 0; l < width; ++l) state[l] *= factors[l];
        for (int64_t k = 0; k < a.heads; ++k) {
          const float weight = job.reward.get()[k * a.columns + first + i];
          float* part = parts + k * job.lanes + j;
          for (int64_t l = 0; l < width; ++l) part[l] += weight * state[l];
        }
      }
    }
  }
}

// Stores one column of d_hidden for the panel of answers at j: gradients times the input dropout, in row-major order.
DPH_FN void put_hidden(const Job& job, int64_t column, int64_t j, const float* values) {
  const SwigluRewardArguments& a = job.a;
  const int64_t filled = std::min(job.width(j), a.rows - j);
  alignas(64) float factors[PANEL];
  draw(factors, job, a.input, column, j, filled);
  for (int64_t l = 0; l < filled; ++l) put(a.d_hidden, (j + l) * a.columns + column, values[l] * factors[l], a.bf16);
}

// Gradients before tanh, of the reward vectors and of b2 for one block of C; without a pooler, gradients of hidden
// instead of those before tanh.
DPH_TARGET inline void pool_backward_block(const Job& job, int64_t block, Scratch&) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * BLOCK, last = std::min(first + BLOCK, a.columns);
  for (int64_t c = first; c < last; ++c) {
    float d_bias = 0.0f, *d_reward = job.parts.get() + c * a.heads;
    for (int64_t k = 0; k < a.heads; ++k) d_reward[k] = 0.0f;
    for (int64_t j = 0; j < job.lanes; j += PANEL) {
      alignas(64) float factors[PANEL], d[PANEL] = {};
      const int64_t width = job.width(j);
      const float* state = a.w2.data ? job.pooled.row(c, j) : job.hidden.row(c, j);
      draw(factors, job, a.pooled, c, j, width);
      for (int64_t k = 0; k < a.heads; ++k) {
        const float* grad = job.grad.get() + k * job.lanes + j;
        const float weight = job.reward.get()[k * a.columns + c];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < width; ++l) {
          sum += grad[l] * (factors[l] * state[l]);
          d[l] += weight * grad[l];
        }
        d_reward[k] += sum;
      }
      if (!a.w2.data) {
        for (int64_t l = 0; l < width; ++l) d[l] *= factors[l];
        if (a.d_hidden) put_hidden(job, c, j, d);
        continue;
      }
      clear_padding(job, d, j);
      float* to = job.d_pooled.row(c, j);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < width; ++l) {
        to[l] = d[l] * factors[l] * (1.0f - state[l] * state[l]);
        sum += to[l];
      }
      d_bias += sum;
    }
    for (int64_t k = 0; a.d_reward && k < a.heads; ++k) put(a.d_reward, k * a.columns + c, d_reward[k], a.bf16);
    if (a.d_b2) put(a.d_b2, c, d_bias, a.bf16);
  }
}

// Gradients of [x | g] and of b1 for one block of F; also recomputes x * silu(g), with features along the lanes.
DPH_TARGET inline void gate_backward_block(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * job.span, count = std::min(job.span, a.width - first);
  const Left turned = {a.w2.data, a.w2.column, a.w2.row, a.bf16, {}};
  float x_biases[SPAN] = {}, g_biases[SPAN] = {};
  for (int64_t begin = 0; begin < job.lanes; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, job.lanes);
    float* sums = s.sums.get();
    if (job.d_projected.data) {
      product(sums, CHUNK, turned, first, count, job.d_pooled, begin, end, s.packed.get());
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t f = first + i;
      for (int64_t j = begin; j < end; j += PANEL) {
        const float *x = job.projected.row(f, j), *g = job.projected.row(a.width + f, j);
        const int64_t width = job.width(j), filled = std::min(width, a.rows - j);
        alignas(64) float gated[PANEL];
        if (job.d_projected.data) {
          float* d = sums + i * CHUNK + j - begin;
          clear_padding(job, d, j);
          float *dx = job.d_projected.row(f, j), *dg = job.d_projected.row(a.width + f, j);
          float x_sum = 0.0f, g_sum = 0.0f;
#pragma omp simd reduction(+ : x_sum, g_sum)
          for (int64_t l = 0; l < width; ++l) {
            const float share = sigmoid_of(g[l]);
            gated[l] = x[l] * (g[l] * share);
            dx[l] = d[l] * (g[l] * share);
            dg[l] = d[l] * x[l] * share * (1.0f + g[l] * (1.0f - share));
            x_sum += dx[l];
            g_sum += dg[l];
          }
          x_biases[i] += x_sum;
          g_biases[i] += g_sum;
        } else {
#pragma omp simd
          for (int64_t l = 0; l < width; ++l) gated[l] = x[l] * (g[l] * sigmoid_of(g[l]));
        }
        if (!job.gated_rows.data) continue;
        float* to = job.gated_rows.row(j, f);
        const int64_t step = job.gated_rows.width(f);
        for (int64_t l = 0; l < filled; ++l) to[l * step] = gated[l];
      }
    }
  }
  for (int64_t i = 0; a.d_b1 && i < count; ++i) {
    put(a.d_b1, first + i, x_biases[i], a.bf16);
    put(a.d_b1, a.width + first + i, g_biases[i], a.bf16);
  }
}

// Gradient of one block of columns of hidden.
DPH_TARGET inline void hidden_backward_block(const Job& job, int64_t block, Scratch& s) {
  const SwigluRewardArguments& a = job.a;
  const int64_t first = block * job.span, count = std::min(job.span, a.columns - first);
  const RewardMatrix& w = a.width ? a.w1 : a.w2;
  const Left turned = {w.data, w.column, w.row, a.bf16, {}};
  const Panels& grad = a.width ? job.d_projected : job.d_pooled;
  for (int64_t begin = 0; begin < job.lanes; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, job.lanes);
    product(s.sums.get(), CHUNK, turned, first, count, grad, begin, end, s.packed.get());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = begin; j < std::min(end, a.rows); j += PANEL) {
        put_hidden(job, first + i, j, s.sums.get() + i * CHUNK + j - begin);
      }
    }
  }
}

// BLOCK rows of a weight gradient: products of features of ``left`` and ``right``, summed over the answers.
DPH_TARGET inline void weight_backward_block(const Panels& left, const Panels& right, int64_t columns, void* out,
                                             bool bf16, int64_t block, Scratch& s) {
  const int64_t first = block * BLOCK, count = std::min(BLOCK, left.features - first);
  if (right.features == 1 || right.features == 2) {
    if (bf16) {
      outer_few(static_cast<uint16_t*>(out), left, right, first, count, columns);
    } else {
      outer_few(static_cast<float*>(out), left, right, first, count, columns);
    }
    return;
  }
  const Left a = {nullptr, 0, 0, false, left};
  for (int64_t begin = 0; begin < right.lanes; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, right.lanes), whole = std::min(end, columns / PANEL * PANEL);
    // Whole panels of floats are written directly to the output, the rest through a buffer.
    const int64_t direct = bf16 ? begin : std::max(begin, whole);
    float* place = static_cast<float*>(out) + first * columns + begin;
    if (direct > begin) product(place, columns, a, first, count, right, begin, direct, s.packed.get());
    if (direct == end) continue;
    product(s.sums.get(), CHUNK, a, first, count, right, direct, end, s.packed.get());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = direct; j < std::min(end, columns); ++j) {
        put(out, (first + i) * columns + j, s.sums.get()[i * CHUNK + j - direct], bf16);
      }
    }
  }
}

#undef DPH_FN
