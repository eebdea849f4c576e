// OpenMP thread index, if the compiler supports OpenMP.
#pragma once

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

}  // namespace dph
