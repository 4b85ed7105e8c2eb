// float32 to int8 per group of 32, as csrc/cpu/isa/quantize.h does it: the same codes, scales and sums.
#pragma once
#include "args.h"
#include "compat.cuh"

namespace ollamapy::cuda {

// Eight neighbouring lanes have a group, four values each; all 32 lanes of a warp come here. `group`, `token`: of the lane.
__device__ __forceinline__ void quantize_group(const float4& v, uint8_t* q, Meta* meta, int64_t group, int token, int tokens, bool live) {
  const int word = threadIdx.x % 8;
  // As integers the magnitudes of floats have the same order, with infinity and every NaN above.
  uint32_t bits = max(max(__float_as_uint(fabsf(v.x)), __float_as_uint(fabsf(v.y))), max(__float_as_uint(fabsf(v.z)), __float_as_uint(fabsf(v.w))));
#pragma unroll
  for (int width = 4; width; width /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, width));
  const float top = __uint_as_float(bits);
  const bool finite = bits < 0x7F800000u, any = finite && top > 4e-37f;
  const float inverse = any ? 127.0f / top : 0.0f;
  uint32_t codes = 0;
  if (any) {
    codes = uint32_t(__float2int_rn(v.x * inverse) & 255) | uint32_t(__float2int_rn(v.y * inverse) & 255) << 8 |
            uint32_t(__float2int_rn(v.z * inverse) & 255) << 16 | uint32_t(__float2int_rn(v.w * inverse) & 255) << 24;
  }
  int sum = __dp4a(int(codes), 0x01010101, 0);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  const int other = __shfl_xor_sync(~0u, sum, 4);
  if (!live) return;
  const int64_t at = group * tokens + token;
  reinterpret_cast<uint32_t*>(q)[at * 8 + word % 4 * 2 + word / 4] = codes;
  if (word == 0) {
    const float scale = any ? top / 127.0f : finite ? 0.0f : __uint_as_float(0x7FC00000u);
    meta[at] = Meta{scale, uint32_t(sum & 0xFFFF) | uint32_t(other) << 16};
  }
}

}  // namespace ollamapy::cuda
