// Includes the file DPH_KERNELS_FILE once per instruction set, each time in a namespace of its own (baseline: SSE2, or
// NEON on Arm; avx2, avx512), with DPH_TARGET (function attribute) and DPH_LANES (vector width in floats) defined; hence
// neither file has an include guard. Explicit targets instead of target_clones: vector types must match the register
// width of the instruction set. Needs instruction_sets.h.

namespace baseline {
#define DPH_TARGET
#define DPH_LANES 4
#include DPH_KERNELS_FILE
#undef DPH_TARGET
#undef DPH_LANES
}  // namespace baseline

#ifdef DPH_X86
namespace avx2 {
#define DPH_TARGET DPH_AVX2
#define DPH_LANES 8
#include DPH_KERNELS_FILE
#undef DPH_TARGET
#undef DPH_LANES
}  // namespace avx2

namespace avx512 {
#define DPH_TARGET DPH_AVX512
#define DPH_LANES 16
#include DPH_KERNELS_FILE
#undef DPH_TARGET
#undef DPH_LANES
}  // namespace avx512
#endif

#undef DPH_KERNELS_FILE
