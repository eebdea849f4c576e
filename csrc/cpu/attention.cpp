// Rotary attention on the CPU: parallel loops over tiles and heads, with kernels selected by the CPU's instruction set.
#include "../attention.h"
#include "instruction_sets.h"
#include "threads.h"

#include <math.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace dph {
namespace {

#define DPH_KERNELS_FILE "attention_kernels.h"
#include "each_instruction_set.h"

struct Kernels {
  int lanes = 4;
  int64_t (*forward)(const AttentionArguments&, int64_t, int64_t, int64_t, float*) = baseline::forward_tile;
  int64_t (*backward)(const AttentionArguments&, int64_t, int64_t, int64_t, int64_t, float*) = baseline::backward_tile;
  void (*rotate)(const RotateArguments&, int64_t, float*) = baseline::rotate_rows;
};

// Kernels for vectors of ``lanes`` floats.
Kernels pick(int lanes) {
#ifdef DPH_X86
  if (lanes == 16) return {16, avx512::forward_tile, avx512::backward_tile, avx512::rotate_rows};
  if (lanes == 8) return {8, avx2::forward_tile, avx2::backward_tile, avx2::rotate_rows};
#endif
  return {};
}

Kernels kernels = pick(vector_floats());

// Memory of each thread, allocated before the parallel region so that the caller can catch an allocation failure.
class Scratch {
 public:
  Scratch(int64_t floats, int threads) : size_((floats + 15) / 16 * 16) {
    data_.reset(static_cast<float*>(aligned_alloc(64, std::max<int64_t>(size_ * threads, 16) * sizeof(float))));
    if (!data_) throw std::bad_alloc();
  }
  float* of(int thread) const { return data_.get() + thread * size_; }

 private:
  struct Free {
    void operator()(float* p) const { free(p); }
  };
  int64_t size_;
  std::unique_ptr<float, Free> data_;
};

// Elements to rotate, and multiply-adds of one product, below which starting threads costs more than the work.
constexpr int64_t WORTH_THREADS = 16384, WORTH_PRODUCTS = 1 << 19;

bool worth_threads(const AttentionArguments& a) {
  int64_t pairs = 0;  // of a query and a key
  for (int64_t i = 0; i < a.work.count; ++i) {
    const int32_t* tile = a.work.tiles + 6 * i;
    for (int32_t run = tile[2]; run < tile[4]; ++run) {
      pairs += int64_t{tile[1] - tile[0]} * (a.work.runs[2 * run + 1] - a.work.runs[2 * run]);
    }
    if (pairs * a.heads * a.head_dim > WORTH_PRODUCTS) return true;
  }
  return false;
}

}  // namespace

int attention_lanes(int most) {
  kernels = pick(vector_floats(most));
  return kernels.lanes;
}

void attention_forward_cpu(const AttentionArguments& a, int threads) {
  const int64_t items = a.work.count * a.key_heads;
  if (!worth_threads(a)) threads = 1;
  const Scratch scratch(baseline::forward_floats(a.head_dim), threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {  // longest first; the heads of a tile are adjacent in memory
    const int64_t group = a.heads / a.key_heads, end = (item % a.key_heads + 1) * group;
    for (int64_t head = end - group; head < end;) {
      head = kernels.forward(a, item / a.key_heads, head, end, scratch.of(thread_number()));
    }
  }
}

void attention_backward_cpu(const AttentionArguments& a, int threads) {
  const int64_t slots = a.key_heads * a.parts, items = a.work.task_count * slots;  // slots: heads of dk and dv
  if (!worth_threads(a)) threads = 1;
  const Scratch scratch(baseline::backward_floats(a.head_dim), threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t task = item / slots, slot = item % slots, key_head = slot / a.parts, part = slot % a.parts;
    const int64_t group = a.heads / a.key_heads, end = (key_head + 1) * group;
    for (int64_t tile = a.work.tasks[task] + part; tile < a.work.tasks[task + 1]; tile += a.parts) {
      for (int64_t head = end - group; head < end;) {
        head = kernels.backward(a, tile, head, end, slot, scratch.of(thread_number()));
      }
    }
  }
}

void rotate_cpu(const RotateArguments& a, int threads) {
  const Scratch scratch(a.head_dim, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (a.rows * a.heads * a.head_dim > WORTH_THREADS)
  for (int64_t row = 0; row < a.rows; ++row) kernels.rotate(a, row, scratch.of(thread_number()));
}

}  // namespace dph
