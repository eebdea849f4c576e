// Products of few rows with weights on the CPU: blocks of rows that fit the cache, times strips of columns in parallel.
#include "../linear.h"
#include "instruction_sets.h"

#include <algorithm>

namespace dph {
namespace {

#define DPH_KERNELS_FILE "linear_kernels.h"
#include "each_instruction_set.h"

struct Kernels {
  int lanes;
  void (*block)(const LinearArguments&, int64_t, int64_t, int64_t, int64_t);
};

Kernels pick(int lanes) {
#ifdef DPH_X86
  if (lanes == 16) return {16, avx512::linear_block};
  if (lanes == 8) return {8, avx2::linear_block};
#endif
  return {4, baseline::linear_block};
}

Kernels kernels = pick(vector_floats());

constexpr int64_t ROW_FLOATS = 1 << 15;    // of a block of rows, which stays in the cache of a core
constexpr int64_t STRIP = 32;              // columns of a work item
constexpr int64_t WORTH_THREADS = 100000;  // products; below this, starting threads costs more than the work

}  // namespace

int linear_lanes(int most) {
  kernels = pick(vector_floats(most));
  return kernels.lanes;
}

void linear_forward_cpu(const LinearArguments& a, int threads) {
  const int64_t strips = (a.columns + STRIP - 1) / STRIP;
  const int64_t block = std::max<int64_t>(ROW_FLOATS / std::max<int64_t>(a.depth, 1) / 4 * 4, 4);
  for (int64_t first = 0; first < a.rows; first += block) {
    const int64_t last = std::min(first + block, a.rows);
#pragma omp parallel for schedule(static) num_threads(threads) if ((last - first) * a.columns * a.depth > WORTH_THREADS)
    for (int64_t strip = 0; strip < strips; ++strip) {
      kernels.block(a, first, last, strip * STRIP, std::min((strip + 1) * STRIP, a.columns));
    }
  }
}

}  // namespace dph
