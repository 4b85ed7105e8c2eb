// Decoding of one block to float32, for host and device. The order of the float operations is that of ggml and gguf-py
// (and of ollamapy.quant): results are equal bit for bit, provided the compiler does not contract a*b+c (-ffp-contract=off;
// nvcc: --fmad=false where that matters). Everything has internal linkage: these functions are compiled once per
// instruction set, and the linker must not merge the copies.
#pragma once
#include <cstring>

#include "blocks.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define OLLAMAPY_INLINE static __host__ __device__ __forceinline__
#else
#define OLLAMAPY_INLINE static inline
#if defined(__F16C__)
#include <immintrin.h>
#endif
#endif

namespace ollamapy {
namespace {

OLLAMAPY_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

OLLAMAPY_INLINE float half_to_float(half_bits h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#elif defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24: exact
  return sign ? -magnitude : magnitude;
#endif
}

OLLAMAPY_INLINE float bfloat_to_float(bfloat_bits b) { return from_bits(uint32_t(b) << 16); }

// Half of 2^(e - 127): the weights of MXFP4 are doubled to be integers. e = 0 and 1 give subnormals.
OLLAMAPY_INLINE float e8m0_to_float_halved(uint8_t e) {
  return from_bits(e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23);
}

OLLAMAPY_INLINE float iq4_value(int index) {
  constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return values[index];
}

OLLAMAPY_INLINE float fp4_value(int index) {  // e2m1, doubled
  constexpr int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return values[index];
}

OLLAMAPY_INLINE uint32_t load_u32(const uint8_t* bytes) {
  uint32_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// 6-bit scale and min of sub-block j of Q4_K and Q5_K, from the 12 packed bytes.
OLLAMAPY_INLINE void scale_and_min(const uint8_t* packed, int j, int& scale, int& min) {
  if (j < 4) {
    scale = packed[j] & 63;
    min = packed[j + 4] & 63;
  } else {
    scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
    min = packed[j + 4] >> 4 | (packed[j] >> 6 << 4);
  }
}

// 6-bit scale of sub-block j of Q3_K, less its offset of 32.
OLLAMAPY_INLINE int q3_scale(const uint8_t* packed, int j) {
  const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
  return (low | (packed[8 + j % 4] >> (j / 4 * 2) & 3) << 4) - 32;
}

OLLAMAPY_INLINE void decode(const BlockF32& b, float* y) { y[0] = b.d; }
OLLAMAPY_INLINE void decode(const BlockF16& b, float* y) { y[0] = half_to_float(b.d); }
OLLAMAPY_INLINE void decode(const BlockBF16& b, float* y) { y[0] = bfloat_to_float(b.d); }

OLLAMAPY_INLINE void decode(const BlockQ4_0& b, float* y) {
  const float d = half_to_float(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float((b.qs[j] & 15) - 8);
    y[j + 16] = d * float((b.qs[j] >> 4) - 8);
  }
}

OLLAMAPY_INLINE void decode(const BlockQ4_1& b, float* y) {
  const float d = half_to_float(b.d), m = half_to_float(b.m);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float(b.qs[j] & 15) + m;
    y[j + 16] = d * float(b.qs[j] >> 4) + m;
  }
}

OLLAMAPY_INLINE void decode(const BlockQ5_0& b, float* y) {
  const float d = half_to_float(b.d);
  const uint32_t qh = load_u32(b.qh);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float(int((b.qs[j] & 15) | (qh >> j & 1) << 4) - 16);
    y[j + 16] = d * float(int(b.qs[j] >> 4 | (qh >> (j + 16) & 1) << 4) - 16);
  }
}

OLLAMAPY_INLINE void decode(const BlockQ5_1& b, float* y) {
  const float d = half_to_float(b.d), m = half_to_float(b.m);
  const uint32_t qh = load_u32(b.qh);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float(int((b.qs[j] & 15) | (qh >> j & 1) << 4)) + m;
    y[j + 16] = d * float(int(b.qs[j] >> 4 | (qh >> (j + 16) & 1) << 4)) + m;
  }
}

OLLAMAPY_INLINE void decode(const BlockQ8_0& b, float* y) {
  const float d = half_to_float(b.d);
  for (int j = 0; j < 32; ++j) y[j] = d * float(b.qs[j]);
}

OLLAMAPY_INLINE void decode(const BlockIQ4_NL& b, float* y) {
  const float d = half_to_float(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * iq4_value(b.qs[j] & 15);
    y[j + 16] = d * iq4_value(b.qs[j] >> 4);
  }
}

OLLAMAPY_INLINE void decode(const BlockMXFP4& b, float* y) {
  const float d = e8m0_to_float_halved(b.e);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * fp4_value(b.qs[j] & 15);
    y[j + 16] = d * fp4_value(b.qs[j] >> 4);
  }
}

OLLAMAPY_INLINE void decode(const BlockQ2_K& b, float* y) {
  const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
  for (int i = 0; i < 16; ++i) {  // sub-block i of 16: bits 2 (i / 2 % 4) of bytes 32 (i / 8) + 16 (i % 2)
    const float scale = d * float(b.scales[i] & 15), min = dmin * float(b.scales[i] >> 4);
    const uint8_t* q = b.qs + i / 8 * 32 + i % 2 * 16;
    const int shift = i / 2 % 4 * 2;
    for (int j = 0; j < 16; ++j) y[16 * i + j] = scale * float(q[j] >> shift & 3) - min;
  }
}

OLLAMAPY_INLINE void decode(const BlockQ3_K& b, float* y) {
  const float d = half_to_float(b.d);
  for (int i = 0; i < 16; ++i) {
    const float scale = d * float(q3_scale(b.scales, i));
    const uint8_t *q = b.qs + i / 8 * 32 + i % 2 * 16, *high = b.hmask + i % 2 * 16;
    const int shift = i / 2 % 4 * 2, bit = i / 2;
    for (int j = 0; j < 16; ++j) y[16 * i + j] = scale * float((q[j] >> shift & 3) + ((high[j] >> bit & 1) << 2) - 4);
  }
}

OLLAMAPY_INLINE void decode(const BlockQ4_K& b, float* y) {
  const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
  for (int i = 0; i < 8; ++i) {  // sub-blocks of 32: low nibbles of 32 bytes, then their high nibbles
    int scale, min;
    scale_and_min(b.scales, i, scale, min);
    const float factor = d * float(scale), offset = dmin * float(min);
    const uint8_t* q = b.qs + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int j = 0; j < 32; ++j) y[32 * i + j] = factor * float(q[j] >> shift & 15) - offset;
  }
}

OLLAMAPY_INLINE void decode(const BlockQ5_K& b, float* y) {
  const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
  for (int i = 0; i < 8; ++i) {
    int scale, min;
    scale_and_min(b.scales, i, scale, min);
    const float factor = d * float(scale), offset = dmin * float(min);
    const uint8_t* q = b.qs + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      y[32 * i + j] = factor * float((q[j] >> shift & 15) | (b.qh[j] >> i & 1) << 4) - offset;
    }
  }
}

OLLAMAPY_INLINE void decode(const BlockQ6_K& b, float* y) {
  const float d = half_to_float(b.d);
  for (int i = 0; i < 16; ++i) {  // runs of 32 weights: half i / 8, low nibbles of 64 bytes before high, 2 bits of 32 bytes
    const float scale = d * float(b.scales[i]);
    const int half = i / 8, run = i / 2 % 4;
    const uint8_t* low = b.ql + half * 64 + run % 2 * 32 + i % 2 * 16;
    const uint8_t* high = b.qh + half * 32 + i % 2 * 16;
    const int low_shift = run / 2 * 4, high_shift = run * 2;
    for (int j = 0; j < 16; ++j) {
      y[16 * i + j] = scale * float(int((low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4) - 32);
    }
  }
}

OLLAMAPY_INLINE void decode(const BlockIQ4_XS& b, float* y) {
  const float d = half_to_float(b.d);
  for (int i = 0; i < 8; ++i) {
    const int low = b.scales_l[i / 2] >> (i % 2 * 4) & 15, high = b.scales_h >> (2 * i) & 3;
    const float scale = d * float((low | high << 4) - 32);
    for (int j = 0; j < 16; ++j) {
      y[32 * i + j] = scale * iq4_value(b.qs[16 * i + j] & 15);
      y[32 * i + j + 16] = scale * iq4_value(b.qs[16 * i + j] >> 4);
    }
  }
}

}  // namespace
}  // namespace ollamapy
