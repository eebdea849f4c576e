// Threads of OpenMP, where the compiler has it.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace dph {

// Which of the threads of a parallel loop this is.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace dph
