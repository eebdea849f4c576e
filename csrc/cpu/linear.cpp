// Products of few rows with weights on the CPU: blocks of rows that fit the cache, times strips of columns in parallel.
#include "../linear.h"
#include "instruction_sets.h"
#include "threads.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dph {
namespace {

#define DPH_KERNELS_FILE "linear_kernels.h"
#include "each_instruction_set.h"

struct Kernels {
  int lanes;
  void (*block)(const LinearArguments&, int64_t, int64_t, int64_t, int64_t);
  int64_t span;  // columns of ``packed``
  void (*packed)(const LinearArguments&, float*, int64_t, int64_t, int64_t);
};

Kernels pick(int lanes) {
#ifdef DPH_X86
  if (lanes == 16) return {16, avx512::linear_block, avx512::SPAN, avx512::linear_packed};
  if (lanes == 8) return {8, avx2::linear_block, avx2::SPAN, avx2::linear_packed};
#endif
  return {4, baseline::linear_block, baseline::SPAN, baseline::linear_packed};
}

Kernels kernels = pick(vector_floats());

constexpr int64_t ROW_FLOATS = 1 << 15;    // of a block of rows, which stays in the cache of a core
constexpr int64_t STRIP = 32;              // columns of a work item
constexpr int64_t WORTH_THREADS = 100000;  // products; below this, starting threads costs more than the work

constexpr int64_t SMALL = 1 << 18, SHALLOW = 1024;  // weights, and their columns, up to which they are transposed
constexpr int64_t PACKED_ROWS = 192;                // of a work item at most, which transposes them again
constexpr int64_t WIDEST = 32;                      // span of the widest vectors

// The choice depends on the weights alone, so that the results of a row do not depend on the other rows.
bool is_small(const LinearArguments& a) { return a.columns * a.depth < SMALL && a.depth <= SHALLOW; }

void forward_small(const LinearArguments& a, int threads) {
  const int64_t spans = (a.columns + kernels.span - 1) / kernels.span;
  const int64_t blocks = (a.rows + PACKED_ROWS - 1) / PACKED_ROWS, items = blocks * spans;
  for_each(items, threads, a.rows * a.columns * a.depth > WORTH_THREADS, [&](int64_t item) {
    alignas(64) float packed[SHALLOW * WIDEST];
    const int64_t block = item / spans;
    kernels.packed(a, packed, a.rows * block / blocks, a.rows * (block + 1) / blocks, item % spans * kernels.span);
  });
}

}  // namespace

int linear_lanes(int most) {
  kernels = pick(vector_floats(most));
  return kernels.lanes;
}

void linear_forward_cpu(const LinearArguments& a, int threads) {
  if (is_small(a)) return forward_small(a, threads);
  const int64_t strips = (a.columns + STRIP - 1) / STRIP;
  const int64_t block = std::max<int64_t>(ROW_FLOATS / std::max<int64_t>(a.depth, 1) / 4 * 4, 4);
  for (int64_t first = 0; first < a.rows; first += block) {
    const int64_t last = std::min(first + block, a.rows);
    for_each(strips, threads, (last - first) * a.columns * a.depth > WORTH_THREADS, [&](int64_t strip) {
      kernels.block(a, first, last, strip * STRIP, std::min((strip + 1) * STRIP, a.columns));
    });
  }
}

}  // namespace dph
