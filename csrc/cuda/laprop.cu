// LaProp on the GPU: one launch and one pass over memory for any number of tensors; and the norm of their gradients.
#include "../laprop.h"

#include <cuda_runtime.h>

namespace dph {
namespace {

constexpr int THREADS = 256;
constexpr int WIDTH = 4;       // vector width in elements: 128-bit loads of float
constexpr int SUM_THREADS = 1024;
constexpr unsigned ALL = 0xffffffffu;

DPH_INLINE bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Declares that a pointer refers to global memory, which the compiler cannot infer for a pointer loaded from memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

struct Nothing {};

__device__ __forceinline__ float4 load_four(const float* values) { return *reinterpret_cast<const float4*>(values); }

__device__ __forceinline__ float4 load_four(const uint16_t* values) {
  const ushort4 v = *reinterpret_cast<const ushort4*>(values);
  return make_float4(float_from_bf16(v.x), float_from_bf16(v.y), float_from_bf16(v.z), float_from_bf16(v.w));
}

__device__ __forceinline__ void store_four(float* values, float4 v) { *reinterpret_cast<float4*>(values) = v; }

__device__ __forceinline__ void store_four(uint16_t* values, float4 v) {
  *reinterpret_cast<ushort4*>(values) =
      make_ushort4(bf16_from_float(v.x), bf16_from_float(v.y), bf16_from_float(v.z), bf16_from_float(v.w));
}

__device__ __forceinline__ float lead_one(const Nothing*, int64_t, float) { return 0.0f; }
__device__ __forceinline__ float4 lead_four(const Nothing*, int64_t, float4) { return float4{}; }

template <class Prior>
__device__ __forceinline__ float lead_one(const Prior* prior, int64_t i, float param) {
  return param - laprop_load(global(prior), i);
}

template <class Prior>
__device__ __forceinline__ float4 lead_four(const Prior* prior, int64_t i, float4 param) {
  const float4 anchor = load_four(global(prior) + i);
  return make_float4(param.x - anchor.x, param.y - anchor.y, param.z - anchor.z, param.w - anchor.w);
}

// Updates elements [begin, end) of one tensor with one block.
template <class Grad, class Prior, bool COPY>
__device__ __forceinline__ void update(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t begin,
                                       int64_t end) {
  float* param = global(t.param);
  float* exp_avg = global(t.exp_avg);
  float* exp_avg_sq = global(t.exp_avg_sq);
  const Grad* grad = global(static_cast<const Grad*>(t.grad));
  const Prior* prior = static_cast<const Prior*>(t.prior);
  uint16_t* copy = COPY ? global(t.copy) : nullptr;
  const bool vectors = aligned(param, 16) && aligned(exp_avg, 16) && aligned(exp_avg_sq, 16) && aligned(copy, 8) &&
                       aligned(grad, WIDTH * sizeof(Grad)) && aligned(prior, WIDTH * sizeof(Prior));
  const int64_t vector_end = vectors ? begin + (end - begin) / WIDTH * WIDTH : begin;
#pragma unroll 1  // five loads are already in flight; more registers would reduce occupancy
  for (int64_t i = begin + threadIdx.x * WIDTH; i < vector_end; i += THREADS * WIDTH) {
    float4 p = load_four(param + i), m = load_four(exp_avg + i), v = load_four(exp_avg_sq + i);
    const float4 g = load_four(grad + i), lead = lead_four(prior, i, p);
    laprop_element(k, scale * g.x, lead.x, p.x, m.x, v.x);
    laprop_element(k, scale * g.y, lead.y, p.y, m.y, v.y);
    laprop_element(k, scale * g.z, lead.z, p.z, m.z, v.z);
    laprop_element(k, scale * g.w, lead.w, p.w, m.w, v.w);
    store_four(param + i, p);
    store_four(exp_avg + i, m);
    store_four(exp_avg_sq + i, v);
    if (COPY) store_four(copy + i, p);
  }
  for (int64_t i = vector_end + threadIdx.x; i < end; i += THREADS) {
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    laprop_element(k, scale * laprop_load(grad, i), lead_one(prior, i, p), p, m, v);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (COPY) copy[i] = bf16_from_float(p);
  }
}

// One thread: advances the clock once for all blocks of the following launch.
__global__ void laprop_clock_kernel(const LapropArguments a) {
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  if (laprop_finite(scale)) *a.coefficients = laprop_advance(a.settings, a.rate, *a.clock);
}

// One block per chunk.
__global__ void __launch_bounds__(THREADS) laprop_kernel(const LapropArguments a, const LapropCoefficients fixed) {
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  if (!laprop_finite(scale)) return;
  const LapropCoefficients k = a.clock ? *a.coefficients : fixed;
  const int64_t chunk = blockIdx.x;
  const LapropTensor t = a.tensors[laprop_row(a.tensors, a.count, chunk)];
  const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
  const int64_t end = min(begin + LAPROP_CHUNK, t.size);
  const int prior = t.prior ? (t.kinds & LAPROP_BF16_PRIOR ? 2 : 1) : 0;
  switch ((t.kinds & LAPROP_BF16_GRAD ? 6 : 0) + 2 * prior + (t.copy ? 1 : 0)) {
    case 0: return update<float, Nothing, false>(t, k, scale, begin, end);
    case 1: return update<float, Nothing, true>(t, k, scale, begin, end);
    case 2: return update<float, float, false>(t, k, scale, begin, end);
    case 3: return update<float, float, true>(t, k, scale, begin, end);
    case 4: return update<float, uint16_t, false>(t, k, scale, begin, end);
    case 5: return update<float, uint16_t, true>(t, k, scale, begin, end);
    case 6: return update<uint16_t, Nothing, false>(t, k, scale, begin, end);
    case 7: return update<uint16_t, Nothing, true>(t, k, scale, begin, end);
    case 8: return update<uint16_t, float, false>(t, k, scale, begin, end);
    case 9: return update<uint16_t, float, true>(t, k, scale, begin, end);
    case 10: return update<uint16_t, uint16_t, false>(t, k, scale, begin, end);
    default: return update<uint16_t, uint16_t, true>(t, k, scale, begin, end);
  }
}

// Sum over a block of N threads in a fixed order; valid in thread 0 only.
template <int N>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[N / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(ALL, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  value = threadIdx.x < N / 32 ? warps[threadIdx.x] : 0.0;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(ALL, value, offset);
  return value;
}

DPH_INLINE double squared(float value) { return static_cast<double>(value) * value; }

// The calling thread's partial sum of the squares of elements [begin, end).
template <class Grad>
__device__ __forceinline__ double squares(const void* values, int64_t begin, int64_t end) {
  const Grad* grad = global(static_cast<const Grad*>(values));
  const int64_t vector_end = aligned(grad, WIDTH * sizeof(Grad)) ? begin + (end - begin) / WIDTH * WIDTH : begin;
  double x = 0.0, y = 0.0, z = 0.0, w = 0.0;  // four independent accumulators, to hide latency
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * WIDTH; i < vector_end; i += THREADS * WIDTH) {
    const float4 g = load_four(grad + i);
    x += squared(g.x);
    y += squared(g.y);
    z += squared(g.z);
    w += squared(g.w);
  }
  for (int64_t i = vector_end + threadIdx.x; i < end; i += THREADS) x += squared(laprop_load(grad, i));
  return (x + y) + (z + w);
}

// One block and one partial sum per chunk. No atomics, so the sum is deterministic.
__global__ void __launch_bounds__(THREADS) gradient_squares_kernel(const GradientNormArguments a) {
  const int64_t chunk = blockIdx.x;
  const GradientTensor t = a.tensors[laprop_row(a.tensors, a.count, chunk)];
  const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
  const int64_t end = min(begin + LAPROP_CHUNK, t.size);
  const double mine =
      t.kinds & LAPROP_BF16_GRAD ? squares<uint16_t>(t.grad, begin, end) : squares<float>(t.grad, begin, end);
  const double sum = block_sum<THREADS>(mine);
  if (threadIdx.x == 0) a.partials[chunk] = sum;
}

// One block: reduces the partial sums and writes norm, scale and finite flag.
__global__ void __launch_bounds__(SUM_THREADS) gradient_norm_kernel(const GradientNormArguments a) {
  double mine = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < a.chunks; chunk += SUM_THREADS) mine += a.partials[chunk];
  const double sum = block_sum<SUM_THREADS>(mine);
  if (threadIdx.x == 0) gradient_norm_result(a, sum);
}

}  // namespace

int laprop_cuda(const LapropArguments& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.clock) laprop_clock_kernel<<<1, 1, 0, on>>>(a);
  if (a.chunks > 0) {
    laprop_kernel<<<static_cast<unsigned>(a.chunks), THREADS, 0, on>>>(a, laprop_coefficients(a.settings));
  }
  return static_cast<int>(cudaGetLastError());
}

int gradient_norm_cuda(const GradientNormArguments& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.chunks > 0) gradient_squares_kernel<<<static_cast<unsigned>(a.chunks), THREADS, 0, on>>>(a);
  gradient_norm_kernel<<<1, SUM_THREADS, 0, on>>>(a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dph
