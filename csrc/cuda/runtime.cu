#include "runtime.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace dph {
namespace {

constexpr int WORDS = 500;  // kernel arguments are limited to 4 KB

struct Words {
  int64_t words[WORDS];
};

__global__ void __launch_bounds__(WORDS) write_kernel(const __grid_constant__ Words source, int64_t* target, int count) {
  if (threadIdx.x < count) target[threadIdx.x] = source.words[threadIdx.x];
}

}  // namespace

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_probe() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // clear the error, so that the next launch does not report it
  return static_cast<int>(error == cudaSuccess && count == 0 ? cudaErrorNoDevice : error);
}

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int cuda_write(const int64_t* words, int64_t count, int64_t* target, void* stream) {
  for (int64_t begin = 0; begin < count; begin += WORDS) {
    const int size = static_cast<int>(std::min<int64_t>(WORDS, count - begin));
    Words source;
    std::copy(words + begin, words + begin + size, source.words);
    write_kernel<<<1, WORDS, 0, static_cast<cudaStream_t>(stream)>>>(source, target + begin, size);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dph
