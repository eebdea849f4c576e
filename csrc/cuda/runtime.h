// CUDA runtime functions used by the bindings.
#pragma once

#include <cstdint>

namespace dph {

// Version of the linked runtime, as 1000 * major + 10 * minor.
int cuda_runtime_version();

// Returns 0 if the driver and a device are usable, else a cudaError_t.
int cuda_probe();

const char* cuda_error_text(int code);

// Copies words from host to device memory as kernel arguments: the host memory can be reused immediately, nothing is
// synchronised, and a CUDA graph captures the values of the words. Returns a cudaError_t.
int cuda_write(const int64_t* words, int64_t count, int64_t* target, void* stream);

}  // namespace dph
