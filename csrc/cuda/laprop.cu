// LaProp on the GPU: one launch for any number of tensors, each byte touched once.
#include "../laprop.h"

#include <cuda_runtime.h>

namespace dph {
namespace {

constexpr int THREADS = 256;
constexpr int WIDTH = 4;  // elements that a thread moves at a time: 128-bit loads of float

DPH_INLINE bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

DPH_INLINE bool vectorisable(const LapropTensor& t) {
  return aligned(t.param, 16) && aligned(t.exp_avg, 16) && aligned(t.exp_avg_sq, 16) && aligned(t.prior, 16) &&
         aligned(t.grad, t.grad_is_bf16 ? 8 : 16) && aligned(t.copy, 8);
}

__device__ __forceinline__ float load_grad(const LapropTensor& t, int64_t i) {
  return t.grad_is_bf16 ? float_from_bf16(static_cast<const uint16_t*>(t.grad)[i]) : static_cast<const float*>(t.grad)[i];
}

__device__ __forceinline__ float4 load_grads(const LapropTensor& t, int64_t i) {
  if (!t.grad_is_bf16) return *reinterpret_cast<const float4*>(static_cast<const float*>(t.grad) + i);
  const ushort4 g = *reinterpret_cast<const ushort4*>(static_cast<const uint16_t*>(t.grad) + i);
  return make_float4(float_from_bf16(g.x), float_from_bf16(g.y), float_from_bf16(g.z), float_from_bf16(g.w));
}

__device__ __forceinline__ void update_one(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t i) {
  float p = t.param[i], m = t.exp_avg[i], v = t.exp_avg_sq[i];
  laprop_element(k, scale * load_grad(t, i), t.prior ? t.prior[i] : p, p, m, v);
  t.param[i] = p;
  t.exp_avg[i] = m;
  t.exp_avg_sq[i] = v;
  if (t.copy) t.copy[i] = bf16_from_float(p);
}

__device__ __forceinline__ void update_four(const LapropTensor& t, const LapropCoefficients& k, float scale, int64_t i) {
  float4 p = *reinterpret_cast<const float4*>(t.param + i);
  float4 m = *reinterpret_cast<const float4*>(t.exp_avg + i);
  float4 v = *reinterpret_cast<const float4*>(t.exp_avg_sq + i);
  const float4 g = load_grads(t, i);
  const float4 prior = t.prior ? *reinterpret_cast<const float4*>(t.prior + i) : p;
  laprop_element(k, scale * g.x, prior.x, p.x, m.x, v.x);
  laprop_element(k, scale * g.y, prior.y, p.y, m.y, v.y);
  laprop_element(k, scale * g.z, prior.z, p.z, m.z, v.z);
  laprop_element(k, scale * g.w, prior.w, p.w, m.w, v.w);
  *reinterpret_cast<float4*>(t.param + i) = p;
  *reinterpret_cast<float4*>(t.exp_avg + i) = m;
  *reinterpret_cast<float4*>(t.exp_avg_sq + i) = v;
  if (t.copy) {
    const ushort4 copy = make_ushort4(bf16_from_float(p.x), bf16_from_float(p.y), bf16_from_float(p.z), bf16_from_float(p.w));
    *reinterpret_cast<ushort4*>(t.copy + i) = copy;
  }
}

// One block to a chunk.
__global__ void __launch_bounds__(THREADS) laprop_kernel(const LapropArguments arguments) {
  const int64_t chunk = blockIdx.x;
  const LapropTensor t = arguments.tensors[laprop_row(arguments.tensors, arguments.count, chunk)];
  const float scale = arguments.grad_scale ? *arguments.grad_scale : 1.0f;
  const int64_t begin = (chunk - t.first_chunk) * LAPROP_CHUNK;
  const int64_t end = min(begin + LAPROP_CHUNK, t.size);
  const int64_t vector_end = vectorisable(t) ? begin + (end - begin) / WIDTH * WIDTH : begin;
#pragma unroll 2
  for (int64_t i = begin + threadIdx.x * WIDTH; i < vector_end; i += THREADS * WIDTH) {
    update_four(t, arguments.coefficients, scale, i);
  }
  for (int64_t i = vector_end + threadIdx.x; i < end; i += THREADS) {
    update_one(t, arguments.coefficients, scale, i);
  }
}

}  // namespace

int laprop_cuda(const LapropArguments& arguments, void* stream) {
  if (arguments.chunks > 0) {
    const auto blocks = static_cast<unsigned>(arguments.chunks);
    laprop_kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dph
