// Rows of x as the matmul kernels take them: int8 per group of 32 k, with float32 scale and the sums of the quants.
#pragma once
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// One quantized activation row; pointers into the row's record.
struct Activation {
  const int8_t* q;        // (K,)
  const float* scale;     // (K / 32,)
  const int32_t* neg32;   // (K / 32,)   minus the sum of q over the group
  const int32_t* neg16;   // (K / 16,)
  const float* sum32;     // (K / 32,)   scale * sum of q
  const float* sum16;     // (K / 16,)
};
INLINE int64_t activation_bytes(int64_t k) { return k + k / 32 * 28; }
INLINE Activation activation(const uint8_t* row, int64_t k) {
  const int64_t groups = k / 32;
  const float* f = (const float*)(row + k);
  return {(const int8_t*)row, f, (const int32_t*)(f + groups), (const int32_t*)(f + 2 * groups), f + 4 * groups, f + 5 * groups};
}

// q = round(x * 127 / max|x|) per 32, never -128. A group with an infinity or a NaN gets a NaN for its scale, so that all outputs
// of the row are NaN and no other row's; one whose 127 / max|x| would not be finite (below 4e-37) counts as zeros.
INLINE void quantize_row(const float* x, int64_t k, uint8_t* row) {
  const int64_t groups = k / 32;
  int8_t* q = (int8_t*)row;
  float* f = (float*)(row + k);
  int32_t *neg32 = (int32_t*)(f + groups), *neg16 = (int32_t*)(f + 2 * groups);
  float *sum32 = f + 4 * groups, *sum16 = f + 5 * groups;
  for (int64_t g = 0; g < groups; g++) {
    const F low = load(x + 32 * g), high = load(x + 32 * g + 16);
    const float top = top_magnitude(low, high);
    int32_t sums[2] = {0, 0};
    float scale = 0.0f;
    if (top > 4e-37f && top < __builtin_inff()) {
      // |x * inverse| can pass 127 only by rounding (127.00001), which still rounds to 127
      const F inverse = splat(127.0f / top);
      scale = top / 127.0f;
      sums[0] = store_rounded(q + 32 * g, mul(low, inverse));
      sums[1] = store_rounded(q + 32 * g + 16, mul(high, inverse));
    } else {
      memset(q + 32 * g, 0, 32);
      if (!(top < __builtin_inff())) scale = __builtin_nanf("");
    }
    f[g] = scale;
    neg32[g] = -(sums[0] + sums[1]);
    neg16[2 * g] = -sums[0];
    neg16[2 * g + 1] = -sums[1];
    sum32[g] = scale * float(sums[0] + sums[1]);
    sum16[2 * g] = scale * float(sums[0]);
    sum16[2 * g + 1] = scale * float(sums[1]);
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
