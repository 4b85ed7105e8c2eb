// The scales of one group of 32 k of a tile, as 16-row float vectors.
#pragma once
#include "tile.h"
#include <type_traits>

namespace ollamapy::OLLAMAPY_ISA {
namespace {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
INLINE Bytes16 bytes16(const uint8_t* p) { Bytes16 r; memcpy(&r, p, 16); return r; }
INLINE F from_u8(Bytes16 b) { uint8_t a[16]; memcpy(a, &b, 16); return load_u8(a); }

INLINE F e8m0_halved(const uint8_t* e) {
  float f[16];
  for (int r = 0; r < 16; r++) f[r] = e8m0_to_float_halved(e[r]);
  return load(f);
}

// s: the scale record of the block that holds the group; g: group within the block
template <class T>
INLINE GroupScales group_scales(const uint8_t* s, int g) {
  GroupScales out;
  if constexpr (T::kFloatScales)
    for (int h = 0; h < (T::kHalves ? 2 : 1); h++) out.scale[h] = load((const float*)s + 16 * h);
  else if constexpr (std::is_same_v<T, MXFP4>) out.scale[0] = e8m0_halved(s);  // the e2m1 table is doubled
  else if constexpr (T::kBlock == 32) {
    out.scale[0] = load_half(s);
    if constexpr (T::kMin) out.min[0] = load_half(s + 32);
  } else if constexpr (std::is_same_v<T, Q4_K> || std::is_same_v<T, Q5_K>) {
    const uint8_t* b = s + 64;
    Bytes16 scale, min;
    if (g < 4) {
      scale = bytes16(b + 16 * g) & uint8_t(63);
      min = bytes16(b + 16 * (g + 4)) & uint8_t(63);
    } else {
      const Bytes16 low = bytes16(b + 16 * (g + 4));
      scale = (low & uint8_t(15)) | ((bytes16(b + 16 * (g - 4)) >> 6) << 4);
      min = (low >> 4) | ((bytes16(b + 16 * g) >> 6) << 4);
    }
    out.scale[0] = mul(load_half(s), from_u8(scale));
    out.min[0] = mul(sub(splat(0.0f), load_half(s + 32)), from_u8(min));
  } else if constexpr (std::is_same_v<T, Q6_K>) {
    const F d = load_half(s);
    out.scale[0] = mul(d, load_s8(s + 32 + 32 * g));
    out.scale[1] = mul(d, load_s8(s + 32 + 32 * g + 16));
  } else if constexpr (std::is_same_v<T, Q2_K>) {
    const F d = load_half(s), dmin = sub(splat(0.0f), load_half(s + 32));
    for (int h = 0; h < 2; h++) {
      const Bytes16 b = bytes16(s + 64 + 32 * g + 16 * h);
      out.scale[h] = mul(d, from_u8(b & uint8_t(15)));
      out.min[h] = mul(dmin, from_u8(b >> 4));
    }
  } else if constexpr (std::is_same_v<T, Q3_K>) {
    const F d = load_half(s);
    const uint8_t* b = s + 32;
    for (int h = 0; h < 2; h++) {
      const int j = 2 * g + h;
      const Bytes16 low = j < 8 ? bytes16(b + 16 * j) & uint8_t(15) : bytes16(b + 16 * (j - 8)) >> 4;
      const Bytes16 high = (bytes16(b + 16 * (8 + j % 4)) >> uint8_t(2 * (j / 4))) & uint8_t(3);
      out.scale[h] = mul(d, sub(from_u8(low | (high << 4)), splat(32.0f)));
    }
  } else {  // IQ4_XS: scales_h 2 bytes, then scales_l 4 bytes
    const uint8_t* b = s + 32;
    const Bytes16 low = (bytes16(b + 16 * (2 + g / 2)) >> uint8_t(4 * (g % 2))) & uint8_t(15);
    const Bytes16 high = (bytes16(b + 16 * (g / 4)) >> uint8_t(2 * (g % 4))) & uint8_t(3);
    out.scale[0] = mul(load_half(s), sub(from_u8(low | (high << 4)), splat(32.0f)));
  }
  return out;
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
