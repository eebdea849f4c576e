// Pooler and reward heads on the CPU: buffers, parallel loops over blocks of features, and selection of the kernels.
#include "../swiglu_reward.h"
#include "instruction_sets.h"
#include "pages.h"
#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace dph {
namespace {

constexpr int64_t BLOCK = 32;   // features per work item
constexpr int64_t SPAN = 128;   // maximum features per work item if weights are read by columns: long runs are faster
constexpr int64_t PANEL = 32;   // columns per panel
constexpr int64_t CHUNK = 256;  // columns of a product computed at a time
constexpr int64_t DEPTH = 128;  // features reduced at a time: a panel of them fills half of the L1 cache
constexpr int FEW = 8;          // maximum number of answers for products with features along the lanes
constexpr int64_t FEW_SPAN = 1024;  // maximum features per work item of those by columns
static_assert(BLOCK == PANEL && CHUNK % PANEL == 0 && DEPTH % PANEL == 0, "blocks are whole panels");

int64_t blocks(int64_t size, int64_t block = BLOCK) { return (size + block - 1) / block; }
// Number of answers rounded up to the next one with a kernel in swiglu_reward_few.h.
int64_t few_lanes(int64_t rows) { return rows > 4 ? FEW : rows > 2 ? 4 : rows; }
int64_t padded(int64_t size) { return (size + REWARD_LANES - 1) / REWARD_LANES * REWARD_LANES; }

// A matrix [features, lanes] stored as panels of 32 columns; the last panel may be narrower.
struct Panels {
  float* data = nullptr;
  int64_t features = 0;
  int64_t lanes = 0;  // columns: a multiple of 16, or ``few_lanes`` of the rows

  DPH_INLINE int64_t width(int64_t column) const { return std::min(PANEL, lanes - column / PANEL * PANEL); }

  // Address of element (feature, column), followed by the rest of its row in the panel.
  DPH_INLINE float* row(int64_t feature, int64_t column) const {
    return data + column / PANEL * PANEL * features + feature * width(column) + column % PANEL;
  }
};

struct Free {
  void operator()(void* p) const { free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T, Free>;

template <class T = float>
Buffer<T> buffer(int64_t size) {
  Buffer<T> memory(static_cast<T*>(aligned_alloc(64, (size * sizeof(T) + 64) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Buffers of one thread, smaller for few answers.
struct Scratch {
  Buffer<float> sums, packed;

  explicit Scratch(bool few)
      : sums(buffer(few ? BLOCK * CHUNK : SPAN * CHUNK)),
        packed(buffer(few ? 2 * FEW * FEW_SPAN : SPAN * (DEPTH + 16))) {}
};

bool are_few(const SwigluRewardArguments& a);

// One call and its intermediate results; ``lanes`` is R padded to whole vectors or to ``few_lanes``.
struct Job {
  const SwigluRewardArguments& a;
  bool few;  // whether products put features along the lanes
  int64_t lanes;
  int64_t span = BLOCK;
  Buffer<float> reward = buffer(a.heads * a.columns);  // [K, C]
  Buffer<uint32_t> row_low = buffer<uint32_t>(lanes), row_high = buffer<uint32_t>(lanes);
  Buffer<float> parts;                                   // rewards: [blocks of C, K, lanes]; d_reward: [C, K]
  Buffer<float> grad;                                    // [K, lanes]
  Panels hidden, projected, gated, pooled;               // answers along the columns
  Panels d_pooled, d_projected;                          // gradients before tanh, and of [x | g]
  Panels hidden_rows, gated_rows;                        // features along the columns
  std::unique_ptr<Buffer<float>[]> owned{new Buffer<float>[8]};
  int held = 0;
  mutable std::vector<Scratch> scratch;  // of each thread; allocated here, so that the caller can catch a failure

  Job(const SwigluRewardArguments& arguments, int threads)
      : a(arguments), few(are_few(a)), lanes(few ? few_lanes(a.rows) : padded(a.rows)) {
    for (int thread = 0; thread < threads; ++thread) scratch.emplace_back(few);
    for (int64_t r = 0; r < lanes; ++r) {
      const uint64_t id = r >= a.rows ? 0 : a.row_ids ? a.row_ids[r] : r;
      row_low.get()[r] = static_cast<uint32_t>(id);
      row_high.get()[r] = static_cast<uint32_t>(id >> 32);
    }
    for (int64_t k = 0; k < a.heads; ++k) {
      for (int64_t c = 0; c < a.columns; ++c) {
        const int64_t at = k * a.reward.row + c * a.reward.column;
        reward.get()[k * a.columns + c] = a.bf16 ? float_from_bf16(static_cast<const uint16_t*>(a.reward.data)[at])
                                                 : static_cast<const float*>(a.reward.data)[at];
      }
    }
    hidden = make(a.columns, lanes);
    projected = {a.kept_projected, 2 * a.width, padded(a.rows)};
    pooled = {a.kept_pooled, a.columns, padded(a.rows)};
  }

  // Width of the panel whose first column is ``lane``.
  DPH_INLINE int64_t width(int64_t lane) const { return std::min(PANEL, lanes - lane); }

  Panels make(int64_t features, int64_t columns) {
    owned[held] = buffer(features * columns);
    return {owned[held++].get(), features, columns};
  }
};

#define DPH_KERNELS_FILE "swiglu_reward_kernels.h"
#include "each_instruction_set.h"

using Stage = void (*)(const Job&, int64_t, Scratch&);

struct Kernels {
  int lanes;
  Stage take_hidden, gate_few, reward_few, turn_hidden, gate, reward, pool_backward, gate_backward, hidden_backward,
      gate_backward_few, hidden_backward_few;
  void (*weight_backward)(const Panels&, const Panels&, int64_t, void*, bool, int64_t, Scratch&);
};

#define DPH_KERNELS(lanes, set)                                                                          \
  {                                                                                                      \
    lanes, set::take_hidden, set::gate_few, set::reward_few, set::turn_hidden,                           \
        set::gate_block, set::reward_block, set::pool_backward_block, set::gate_backward_block,          \
        set::hidden_backward_block, set::gate_backward_few, set::hidden_backward_few,                    \
        set::weight_backward_block                                                                       \
  }

// Kernels for vectors of ``lanes`` floats.
Kernels pick(int lanes) {
#ifdef DPH_X86
  if (lanes == 16) return DPH_KERNELS(16, avx512);
  if (lanes == 8) return DPH_KERNELS(8, avx2);
#endif
  return DPH_KERNELS(4, baseline);
}

Kernels kernels = pick(vector_floats());

// Whether to put features along the lanes: few answers, row-major weights and enough features for a vector.
bool are_few(const SwigluRewardArguments& a) {
  const bool lies = a.w2.column == 1 && (!a.width || a.w1.column == 1);
  const bool wide = a.columns >= kernels.lanes && (!a.width || a.width >= kernels.lanes);
  return a.rows > 0 && a.rows <= FEW && a.w2.data && lies && wide;
}

// Calls run(block, scratch) for all blocks, on all threads unless ``brief``.
template <class Run>
void each(int64_t count, const Job& job, const Run& run, bool brief = false) {
  const int64_t threads = std::min<int64_t>(job.scratch.size(), count);
  if (brief || threads <= 1) {  // a region takes a few microseconds, on a single thread, too
    for (int64_t block = 0; block < count; ++block) run(block, job.scratch[0]);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t block = 0; block < count; ++block) run(block, job.scratch[thread_number()]);
}

void each(int64_t count, const Job& job, Stage stage, bool brief = false) {
  each(count, job, [&](int64_t block, Scratch& scratch) { stage(job, block, scratch); }, brief);
}

}  // namespace

int swiglu_reward_lanes(int most) {
  kernels = pick(vector_floats(most));
  return kernels.lanes;
}

void swiglu_reward_forward_cpu(const SwigluRewardArguments& a, int threads) {
  Job job(a, threads);
  const int64_t count = blocks(a.columns);
  job.parts = buffer(count * a.heads * job.lanes);
  each(count, job, kernels.take_hidden, job.few);
  if (a.width) {
    job.gated = job.make(a.width, job.lanes);
    each(blocks(a.width), job, job.few ? kernels.gate_few : kernels.gate);
  }
  each(count, job, job.few ? kernels.reward_few : kernels.reward);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t k = 0; k < a.heads; ++k) {
      float sum = 0.0f;
      for (int64_t block = 0; block < count; ++block) {
        sum += job.parts.get()[(block * a.heads + k) * job.lanes + r];
      }
      a.rewards[r * a.heads + k] = sum;
    }
  }
}

void swiglu_reward_backward_cpu(const SwigluRewardArguments& a, int threads) {
  Job job(a, threads);
  job.parts = buffer(a.columns * a.heads);
  job.grad = buffer(a.heads * job.lanes);
  for (int64_t k = 0; k < a.heads; ++k) {
    for (int64_t r = 0; r < job.lanes; ++r) {
      job.grad.get()[k * job.lanes + r] = r < a.rows ? a.grad[r * a.grad_row + k * a.grad_column] : 0.0f;
    }
  }
  void* wide = a.width ? a.d_w1 : a.d_w2;  // weight gradient that is computed from hidden
  if (wide || !a.w2.data) each(blocks(a.columns), job, kernels.take_hidden, job.few);
  if (a.w2.data) job.d_pooled = job.make(a.columns, job.lanes);
  each(blocks(a.columns), job, kernels.pool_backward, job.few);
  if (!a.w2.data) return;

  const bool below = a.width && (a.d_hidden || a.d_w1 || a.d_b1);
  if (below) job.d_projected = job.make(2 * a.width, job.lanes);
  if (a.width && a.d_w2) {
    job.gated_rows = job.make(a.rows, padded(a.width));
    const int64_t last = (a.width - 1) / PANEL * PANEL;  // the last panel may extend beyond F
    memset(job.gated_rows.row(0, last), 0, a.rows * job.gated_rows.width(last) * sizeof(float));
  }
  auto spans = [&](int64_t features, Stage stage) {
    job.span = blocks(features, SPAN) >= 2 * threads ? SPAN : BLOCK;
    if (job.few) job.span = blocks(blocks(features), threads * blocks(features, threads * FEW_SPAN)) * BLOCK;
    each(blocks(features, job.span), job, stage);
  };
  if (below || job.gated_rows.data) spans(a.width, job.few ? kernels.gate_backward_few : kernels.gate_backward);
  if (a.d_hidden) spans(a.columns, job.few ? kernels.hidden_backward_few : kernels.hidden_backward);
  if (wide) {
    job.hidden_rows = job.make(a.rows, padded(a.columns));
    each(blocks(a.columns), job, kernels.turn_hidden, job.few);
  }
  auto weight = [&](const Panels& left, const Panels& right, int64_t columns, void* out) {
    prefer_huge_pages(out, left.features * columns * (a.bf16 ? sizeof(uint16_t) : sizeof(float)));
    each(blocks(left.features), job, [&](int64_t block, Scratch& scratch) {
      kernels.weight_backward(left, right, columns, out, a.bf16, block, scratch);
    });
  };
  if (wide) weight(a.width ? job.d_projected : job.d_pooled, job.hidden_rows, a.columns, wide);
  if (job.gated_rows.data) weight(job.d_pooled, job.gated_rows, a.width, a.d_w2);
}

}  // namespace dph
