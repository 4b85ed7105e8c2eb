// The few device functions that are more than plain C++, so that one source serves nvcc and, for tests, a C++ compiler with
// tests/cuda/cuda_on_cpu.h: kernels call `ptx::`, never inline assembly.
#pragma once
#include <cstdint>

#include "args.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CUDA_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define CUDA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace ptx {

// c (16, 8) += a (16, 32) b (32, 8), int8. a: rows lane / 4 and that + 8 of k (lane % 4) * 4..., then the same of k + 16.
__device__ __forceinline__ void mma_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with k = 16.
__device__ __forceinline__ void mma_k16(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}
// BYTES (4 or 16) from global to shared memory, in the background.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Weights are read once: they leave the L1 cache to the activations.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

}  // namespace ptx
#else
#include "cuda_on_cpu.h"
#endif

namespace ptx {

__device__ __forceinline__ float load_float(const void* from, int64_t at, ollamapy::cuda::Type type) {
  if (type == ollamapy::cuda::Type::kFloat) return static_cast<const float*>(from)[at];
  const uint16_t bits = static_cast<const uint16_t*>(from)[at];
  return type == ollamapy::cuda::Type::kHalf ? from_half(bits) : __uint_as_float(uint32_t(bits) << 16);
}
__device__ __forceinline__ void store_float(void* to, int64_t at, float value, ollamapy::cuda::Type type) {
  if (type == ollamapy::cuda::Type::kFloat) static_cast<float*>(to)[at] = value;
  else static_cast<uint16_t*>(to)[at] = type == ollamapy::cuda::Type::kHalf ? to_half(value) : to_bfloat(value);
}

}  // namespace ptx
