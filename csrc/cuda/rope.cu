// Heads of q, k and v on their way to attention: norm, rotation, and keys and values to the paged cache. One warp a head.
#include "args.h"
#include "compat.cuh"

namespace ollamapy::cuda {
namespace {

constexpr int kHeadWarps = 4;
constexpr int kEach = 8;  // values a lane has: heads of up to 256

// blockIdx.x: a token; blockIdx.y and the warp: a head, those of q first, then k, then v. Lane l has elements l, l + 32, ...
__global__ void __launch_bounds__(32 * kHeadWarps) rope_kernel(const RopeArgs args) {
  __shared__ float turned[kHeadWarps][32 * kEach];
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int head = blockIdx.y * kHeadWarps + warp;
  if (head >= args.heads + 2 * args.kv_heads) return;
  const bool is_q = head < args.heads, is_v = head >= args.heads + args.kv_heads;
  head -= is_q ? 0 : is_v ? args.heads + args.kv_heads : args.heads;
  const int length = is_v ? args.value_length : args.length;
  const float* from = is_q   ? args.q + token * args.q_stride + int64_t(head) * length
                      : is_v ? args.v + token * args.v_stride + int64_t(head) * length
                             : args.k + token * args.k_stride + int64_t(head) * length;
  float value[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) value[i] = lane + 32 * i < length ? from[lane + 32 * i] : 0.0f;
  const float* norm = is_v ? nullptr : is_q ? args.q_norm : args.k_norm;
  if (norm) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; i++) squares += value[i] * value[i];
#pragma unroll
    for (int width = 16; width; width /= 2) squares += __shfl_xor_sync(~0u, squares, width);
    const float scale = 1.0f / sqrtf(squares / float(length) + args.eps);
#pragma unroll
    for (int i = 0; i < kEach; i++)
      if (lane + 32 * i < length) value[i] *= scale * norm[lane + 32 * i];
  }
  if (!is_v) {
    float* mine = turned[warp];
#pragma unroll
    for (int i = 0; i < kEach; i++) mine[lane + 32 * i] = value[i];
    __syncwarp();
    const int half = args.rot / 2;
    const float* turns = args.turns + args.positions[token] * args.rot;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int at = lane + 32 * i;
      if (at >= args.rot) continue;
      const int pair = args.interleaved ? at / 2 : at % half;
      const bool second = args.interleaved ? at % 2 : at >= half;
      const float partner = mine[args.interleaved ? at ^ 1 : second ? at - half : at + half];
      const float cosine = turns[pair], sine = turns[half + pair];
      value[i] = value[i] * cosine + (second ? partner * sine : -partner * sine);
    }
  }
  if (is_q) {
    const float factor = args.temperature ? args.temperature[token] : 1.0f;
#pragma unroll
    for (int i = 0; i < kEach; i++)
      if (lane + 32 * i < length)
        ptx::store_float(args.out, (int64_t(token) * args.heads + head) * length + lane + 32 * i, value[i] * factor, args.out_type);
    return;
  }
  const int64_t slot = args.slots[token];
  if (slot < 0) return;  // nobody's
  const int64_t to = ((slot / args.block * args.kv_heads + head) * args.block + slot % args.block) * length;
#pragma unroll
  for (int i = 0; i < kEach; i++)
    if (lane + 32 * i < length) ptx::store_float(is_v ? args.value : args.key, to + lane + 32 * i, value[i], args.cache_type);
}

}  // namespace
}  // namespace ollamapy::cuda

// Heads of up to 256. 0, or a CUDA error code.
extern "C" int ollamapy_rope(const ollamapy::cuda::RopeArgs* args, void* stream) {
  using namespace ollamapy::cuda;
  const dim3 grid(args->tokens, (args->heads + 2 * args->kv_heads + kHeadWarps - 1) / kHeadWarps);
  CUDA_LAUNCH(rope_kernel, grid, 32 * kHeadWarps, 0, stream, *args);
  return cudaGetLastError();
}
