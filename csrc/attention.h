// Rotary attention over a packed layout on the CPU: arguments passed by dph_kernels/rope_attention/native.py.
#pragma once

#include "common.h"

namespace dph {

// Tensor [rows, heads, D] whose last dimension is contiguous; strides in elements.
struct AttentionRows {
  void* data = nullptr;
  int64_t row = 0;
  int64_t head = 0;
};

// Tile schedule; dph_kernels/rope_attention/schedule.py documents the format.
struct AttentionSchedule {
  const int32_t* tiles = nullptr;   // [count, 6]: start, end, first_run, first_masked, last_run, parts
  const int32_t* runs = nullptr;    // [.., 2]: start, end; memory rows precede new keys
  const int32_t* bounds = nullptr;  // [T, 4]: own start, own end, prefix start, prefix end
  const int32_t* tasks = nullptr;   // [task_count + 1]: first tile of each task (one thread); null: one task per tile
  int64_t count = 0;
  int64_t task_count = 0;
};

struct AttentionArguments {
  AttentionSchedule work;
  int64_t heads = 0;      // of q, out, grad and dq
  int64_t key_heads = 0;  // of k, v and memory; the query heads of a group, heads / key_heads, are adjacent
  int64_t head_dim = 0;
  int64_t memory = 0;  // keys [0, memory) are rows of memory_k and memory_v
  double scale = 1.0;
  bool bf16 = false;  // q, k, v, memory, out, grad and dq are bf16; all other tensors are float
  AttentionRows q, k, v, memory_k, memory_v, out;  // k holds rotated keys
  const float* q_cos = nullptr;                    // [T, D/2]
  const float* q_sin = nullptr;
  float* lse = nullptr;  // [T, heads], base 2: a single large score is kept exactly
  // Backward only. dq has the dtype of q; dk (of the rotated keys) and dv are float, must be zeroed by the caller, and
  // have key_heads * parts heads: the tiles of a task are divided into parts, which add to separate heads.
  AttentionRows grad, dq, dk, dv;
  int64_t parts = 1;
};

constexpr int64_t ATTENTION_ROWS = 64;   // rows per tile: queries of one head, or of several heads of a group
constexpr int64_t ATTENTION_BLOCK = 64;  // keys per block

// Limits the vector width to ``most`` floats and returns the width selected for this CPU. For tests.
int attention_lanes(int most);

void attention_forward_cpu(const AttentionArguments& arguments, int threads);

// Tiles of different tasks share no new keys, so no two threads accumulate into the same elements of dk and dv: one
// thread computes all tiles of a part of a task, in order.
void attention_backward_cpu(const AttentionArguments& arguments, int threads);

// out[t, h] = in[t, h] with its two halves rotated by the angles given as cos and sign * sin.
struct RotateArguments {
  AttentionRows in, out;
  const float* cos = nullptr;  // [T, D/2]
  const float* sin = nullptr;
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  float sign = 1.0f;
  bool in_bf16 = false;
  bool out_bf16 = false;
};

void rotate_cpu(const RotateArguments& arguments, int threads);

}  // namespace dph
