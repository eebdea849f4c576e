// What the bindings need to know of the CUDA runtime.
#pragma once

namespace dph {

// Version of the runtime that is linked in, as 1000 * major + 10 * minor.
int cuda_runtime_version();

// 0 where the driver and a device can be used, else a cudaError_t.
int cuda_probe();

const char* cuda_error_text(int code);

}  // namespace dph
