// What stands between two matmuls: residual sum, RMSNorm, gated activation, and activations to int8. One pass each.
#include "quantize.cuh"

namespace ollamapy::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float activate(float x, int gelu) {
  if (!gelu) return x * sigmoid(x);
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanhf(inner));
}

__device__ __forceinline__ float4 load4(const void* from, int64_t at, Type type) {
  if (type == Type::kFloat) return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
  return make_float4(ptx::load_float(from, at, type), ptx::load_float(from, at + 1, type), ptx::load_float(from, at + 2, type),
                     ptx::load_float(from, at + 3, type));
}

// One block for kThreads * 4 values of a token. Without `up`: the values of gate themselves.
__global__ void __launch_bounds__(kThreads) gated_kernel(const GatedArgs args) {
  const int token = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * 4;  // y has 65,535 blocks at most
  const bool live = i < args.width;
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (live) {
    v = load4(args.gate, token * args.stride + i, args.type);
    if (args.up) {
      const float4 up = load4(args.up, token * args.stride + i, args.type);
      v = make_float4(activate(v.x, args.gelu) * up.x, activate(v.y, args.gelu) * up.y, activate(v.z, args.gelu) * up.z,
                      activate(v.w, args.gelu) * up.w);
    }
  }
  quantize_group(v, args.q, args.meta, i / 32, token, args.tokens, live);
}

// The sum of all threads, in one order. `parts`: its own for each call of a kernel.
__device__ __forceinline__ float sum_of_block(float value, float* parts) {
#pragma unroll
  for (int width = 16; width; width /= 2) value += __shfl_xor_sync(~0u, value, width);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; i++) value += parts[i];
  return value;
}

__device__ __forceinline__ float squared(const float4& v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }
__device__ __forceinline__ float4 scaled(const float4& v, float by, const float* weight) {
  const float4 w = *reinterpret_cast<const float4*>(weight);
  return make_float4(v.x * by * w.x, v.y * by * w.y, v.z * by * w.z, v.w * by * w.w);
}

// One block a token: x += delta, or its RMSNorm by `post`; x / sqrt(mean(x^2) + eps) * weight as int8.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormArgs args) {
  __shared__ float parts[2][kThreads / 32];
  const int token = blockIdx.x;
  float* x = args.x + int64_t(token) * args.width;
  const float* delta = args.delta ? args.delta + int64_t(token) * args.width : nullptr;
  float branch = 0.0f;
  if (args.post) {
    float squares = 0.0f;
    for (int i = threadIdx.x * 4; i < args.width; i += kThreads * 4) squares += squared(*reinterpret_cast<const float4*>(delta + i));
    branch = 1.0f / sqrtf(sum_of_block(squares, parts[1]) / float(args.width) + args.eps);
  }
  float squares = 0.0f;
  for (int i = threadIdx.x * 4; i < args.width; i += kThreads * 4) {
    float4 v = *reinterpret_cast<const float4*>(x + i);
    if (delta) {
      float4 d = *reinterpret_cast<const float4*>(delta + i);
      if (args.post) d = scaled(d, branch, args.post + i);
      v = make_float4(v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w);
      *reinterpret_cast<float4*>(x + i) = v;
    }
    squares += squared(v);
  }
  if (!args.weight) return;
  const float scale = 1.0f / sqrtf(sum_of_block(squares, parts[0]) / float(args.width) + args.eps);
  // Whole warps take part in the quantization of a group: the loop ends for all threads at once.
  for (int first = 0; first < args.width; first += kThreads * 4) {
    const int i = first + threadIdx.x * 4;
    const bool live = i < args.width;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (live) v = scaled(*reinterpret_cast<const float4*>(x + i), scale, args.weight + i);  // of x, what this very thread has written
    quantize_group(v, args.q, args.meta, i / 32, token, args.tokens, live);
  }
}

}  // namespace
}  // namespace ollamapy::cuda

// width % 32 == 0. 0, or a CUDA error code.
extern "C" int ollamapy_norm(const ollamapy::cuda::NormArgs* args, void* stream) {
  using namespace ollamapy::cuda;
  CUDA_LAUNCH(norm_kernel, args->tokens, kThreads, 0, stream, *args);
  return cudaGetLastError();
}

extern "C" int ollamapy_gated(const ollamapy::cuda::GatedArgs* args, void* stream) {
  using namespace ollamapy::cuda;
  const dim3 grid(args->tokens, (args->width + kThreads * 4 - 1) / (kThreads * 4));
  CUDA_LAUNCH(gated_kernel, grid, kThreads, 0, stream, *args);
  return cudaGetLastError();
}
