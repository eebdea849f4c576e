// What the bindings need to know of the CUDA runtime.
#pragma once

#include <cstdint>

namespace dph {

// Version of the runtime that is linked in, as 1000 * major + 10 * minor.
int cuda_runtime_version();

// 0 where the driver and a device can be used, else a cudaError_t.
int cuda_probe();

const char* cuda_error_text(int code);

// Write words of host memory to device memory, as arguments of launches: the host memory is free at once, nothing waits,
// and a CUDA graph that captures it holds the words themselves. Returns a cudaError_t.
int cuda_write(const int64_t* words, int64_t count, int64_t* target, void* stream);

}  // namespace dph
