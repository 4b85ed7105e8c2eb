// Where a block of the paged KV cache keeps its keys and values, and how they are read and written, by type of cache.
#pragma once
#include "../decoder.h"
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// Bytes of one KV head's keys (or values) of a block of 16 tokens.
template <CacheType C>
constexpr int64_t head_bytes(int length) { return C == kCacheQ8_0 ? length / 32 * kQ8GroupBytes : int64_t(length) * 16 * (C == kCacheF32 ? 4 : 2); }

// Byte of component d of token `lane`: keys lie (component, 16 tokens), values (16 tokens, component); both by groups of 32
// components in q8_0, each group followed by the scales of the 16 tokens.
template <CacheType C>
INLINE int64_t key_at(int d, int lane) { return C == kCacheQ8_0 ? d / 32 * kQ8GroupBytes + d % 32 * 16 + lane : (d * 16 + lane) * (C == kCacheF32 ? 4 : 2); }
template <CacheType C>
INLINE int64_t value_at(int d, int lane, int length) { return C == kCacheQ8_0 ? d / 32 * kQ8GroupBytes + lane * 32 + d % 32 : (int64_t(lane) * length + d) * (C == kCacheF32 ? 4 : 2); }

template <CacheType C>
INLINE F load_cache(const uint8_t* p) {  // 16 elements; of q8_0 the quants
  if constexpr (C == kCacheF16) return load_half(p);
  else if constexpr (C == kCacheBF16) return load_bf16(p);
  else if constexpr (C == kCacheQ8_0) return load_s8(p);
  else return load((const float*)p);
}

INLINE half_bits float_to_half(float f) {  // round to nearest even
#if defined(__F16C__)
  return _cvtss_sh(f, 0);
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns the mantissa so that the low bits are the half's
    float a;
    memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t r;
    memcpy(&r, &a, 4);
    return uint16_t(sign | (r - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}

// 32 values as one block of Q8_0: the scale is max|x| / 127 as a half, and the quants are rounded to multiples of that half,
// so that no value is off by more than half a step. An infinity or a NaN makes the scale that.
INLINE void quantize_q8_0(const float* x, int8_t q[32], uint16_t* scale) {
  const F low = load(x), high = load(x + 16);
  *scale = float_to_half(top_magnitude(low, high) / 127.0f);
  const float step = half_to_float(*scale);
  if (!(step > 0.0f && step < __builtin_inff())) {
    memset(q, 0, 32);
    return;
  }
  const F inverse = splat(1.0f / step), most = splat(127.0f), least = splat(-127.0f), zero = splat(0.0f);
  for (int i = 0; i < 2; i++) {  // a step that is a subnormal half may be a good deal too small
    const F y = max(mul(i ? high : low, inverse), least);
    store_rounded(q + 16 * i, sub(zero, max(sub(zero, y), sub(zero, most))));
  }
}

// A token's keys (keys = true) or values of one head, at `lane` of the head's block.
template <CacheType C, bool keys>
INLINE void store_cache(uint8_t* head, int lane, const float* x, int length) {
  const auto at = [&](int d) { return head + (keys ? key_at<C>(d, lane) : value_at<C>(d, lane, length)); };
  if constexpr (C == kCacheQ8_0) {
    for (int d = 0; d < length; d += 32) {
      int8_t q[32];
      uint16_t scale;
      quantize_q8_0(x + d, q, &scale);
      for (int i = 0; i < 32; i++) memcpy(at(d + i), q + i, 1);
      memcpy(head + d / 32 * kQ8GroupBytes + 512 + 2 * lane, &scale, 2);
    }
  } else {
    for (int d = 0; d < length; d++) {
      if constexpr (C == kCacheF32) memcpy(at(d), x + d, 4);
      else {
        uint16_t h;
        if constexpr (C == kCacheBF16) {
          uint32_t b;
          memcpy(&b, x + d, 4);
          h = (b & 0x7fffffff) > 0x7f800000 ? uint16_t((b >> 16) | 0x40) : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);  // NaN stays
        } else {
          h = float_to_half(x[d]);
        }
        memcpy(at(d), &h, 2);
      }
    }
  }
}

}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
