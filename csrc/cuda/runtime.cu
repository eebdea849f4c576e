#include "runtime.h"

#include <cuda_runtime.h>

namespace dph {

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_probe() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // a failed probe must not show up in the next launch
  return static_cast<int>(error == cudaSuccess && count == 0 ? cudaErrorNoDevice : error);
}

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace dph
