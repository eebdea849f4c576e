// OpenMP thread index and loops, if the compiler supports OpenMP.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();  // instead of <omp.h>, which clang has only if libomp's headers are installed
#endif

namespace dph {

// Index of the calling thread in the parallel region; 0 without OpenMP.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls run(i) for each i in [0, count), on several threads if it is ``worth`` it: an OpenMP region takes longer than a
// few rows, on a single thread, too.
template <class Run>
inline void for_each(int64_t count, int threads, bool worth, const Run& run) {
  if (!worth || threads == 1) {
    for (int64_t i = 0; i < count; ++i) run(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) run(i);
}

}  // namespace dph
