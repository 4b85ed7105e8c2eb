// Vectors of one weight tile: 16 rows. Three implementations with one interface: AVX-512 (VNNI), AVX2, portable.
//
//   F  16 floats, one per row          I  16 int32, one per row          B  64 bytes: 4 consecutive k of each of 16 rows
//
// Compiled once per instruction set; nothing here has external linkage.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../../common/dequant.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)
constexpr bool kPortable = false, kManyRegisters = true;
struct F { __m512 v; };
struct I { __m512i v; };
struct B { __m512i v; };

INLINE B load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_bytes(void* p, B a) { _mm512_storeu_si512(p, a.v); }
INLINE B low_nibbles(B a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
INLINE B high_nibbles(B a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// bits [shift, shift + width) of every byte, moved to bit `to`
template <int shift, int mask, int to>
INLINE B field_to(B a) {
  if constexpr (shift > to) return {_mm512_and_si512(_mm512_srli_epi16(a.v, shift - to), _mm512_set1_epi8(char(mask << to)))};
  else return {_mm512_and_si512(_mm512_slli_epi16(a.v, to - shift), _mm512_set1_epi8(char(mask << to)))};
}
INLINE B either(B a, B b) { return {_mm512_or_si512(a.v, b.v)}; }
INLINE B lookup(B index, const uint8_t* table) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index.v)};
}
// acc[r] += sum over 4 k of weight[r][k] (unsigned) * act[k] (signed)
struct A { __m512i v; };  // 4 consecutive k of one row of x, for all 16 lanes
INLINE A load_quad(const int8_t* p) { int32_t four; memcpy(&four, p, 4); return {_mm512_set1_epi32(four)}; }
template <bool wide>
INLINE I dot4(I acc, B weight, A act) { return {_mm512_dpbusd_epi32(acc.v, weight.v, act.v)}; }
INLINE I splat(int32_t a) { return {_mm512_set1_epi32(a)}; }
INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int n>
INLINE I shift_left(I a) { return {_mm512_slli_epi32(a.v, n)}; }
INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE F splat(float a) { return {_mm512_set1_ps(a)}; }
INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
INLINE F load_half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE F load_u8(const void* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
INLINE F load_s8(const void* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE float reduce_add(F a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a.v); }
INLINE F load_bf16(const void* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}; }
// keeps lanes [begin, end), sets the others to `other`
INLINE F keep_lanes(F a, int begin, int end, float other) {
  const uint32_t low = end >= 16 ? 0xffffu : (1u << (end < 0 ? 0 : end)) - 1, high = begin <= 0 ? 0xffffu : begin >= 16 ? 0u : 0xffffu << begin;
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), __mmask16(low & high), a.v)};
}
INLINE F exp2_scale(F p, F n) { return {_mm512_scalef_ps(p.v, n.v)}; }
// max(|a|, |b|) over all lanes; as bit patterns, so that infinity and then NaN pass everything finite
INLINE float top_magnitude(F a, F b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a.v), magnitude), _mm512_and_si512(_mm512_castps_si512(b.v), magnitude))))));
}
// rounds to nearest even, stores 16 int8, returns their sum; |a| <= 127
INLINE int32_t store_rounded(int8_t* p, F a) {
  const __m512i n = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(n));
  return _mm512_reduce_add_epi32(n);
}
INLINE F round_even(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

#elif defined(__AVX2__)
constexpr bool kPortable = false, kManyRegisters = false;
struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

INLINE B load_bytes(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
INLINE void store_bytes(void* p, B x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)p + 1, x.b); }
template <int shift, int mask, int to>
INLINE B field_to(B x) {
  const __m256i m = _mm256_set1_epi8(char(mask << to));
  if constexpr (shift > to)
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, shift - to), m), _mm256_and_si256(_mm256_srli_epi16(x.b, shift - to), m)};
  else
    return {_mm256_and_si256(_mm256_slli_epi16(x.a, to - shift), m), _mm256_and_si256(_mm256_slli_epi16(x.b, to - shift), m)};
}
INLINE B low_nibbles(B x) { return field_to<0, 15, 0>(x); }
INLINE B high_nibbles(B x) { return field_to<4, 15, 0>(x); }
INLINE B either(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INLINE B lookup(B index, const uint8_t* table) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
// maddubs adds pairs in int16: exact while 2 * weight * 127 < 32768, that is for weights below 129. `wide` weights (to 255)
// go through int16 products instead.
template <bool wide>
INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i act) {
  if constexpr (wide) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(act, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(act, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  } else {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, act), _mm256_set1_epi16(1)));
  }
}
struct A { __m256i v; };
INLINE A load_quad(const int8_t* p) { int32_t four; memcpy(&four, p, 4); return {_mm256_set1_epi32(four)}; }
template <bool wide>
INLINE I dot4(I acc, B weight, A act) { return {dot4_half<wide>(acc.a, weight.a, act.v), dot4_half<wide>(acc.b, weight.b, act.v)}; }
INLINE I splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int n>
INLINE I shift_left(I x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE F load_half(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
INLINE F load_u8(const void* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const uint8_t*)p + 8))))};
}
INLINE F load_s8(const void* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const uint8_t*)p + 8))))};
}
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }

INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE float reduce_add(F x) {
  const __m256 b = _mm256_add_ps(x.a, x.b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float reduce_max(F x) {
  const __m256 b = _mm256_max_ps(x.a, x.b);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
INLINE F load_bf16(const void* p) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(w)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(w, 1)), 16))};
}
INLINE F keep_lanes(F x, int begin, int end, float other) {
  float f[16];
  store(f, x);
  for (int i = 0; i < 16; i++) f[i] = i >= begin && i < end ? f[i] : other;
  return load(f);
}
INLINE __m256 exp2_scale_half(__m256 p, __m256 n) {
  const __m256 one = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-126.0f))), _mm256_set1_epi32(127)), 23));
  return _mm256_mul_ps(p, one);
}
INLINE F exp2_scale(F p, F n) { return {exp2_scale_half(p.a, n.a), exp2_scale_half(p.b, n.b)}; }
INLINE float top_magnitude(F x, F y) {
  const __m256i m = _mm256_set1_epi32(0x7fffffff);
  const auto magnitude = [m](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), m); };
  const __m256i top = _mm256_max_epi32(_mm256_max_epi32(magnitude(x.a), magnitude(x.b)), _mm256_max_epi32(magnitude(y.a), magnitude(y.b)));
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
}
INLINE int32_t store_rounded(int8_t* p, F x) {
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
  const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(low, high));
  __m128i sum = _mm_madd_epi16(_mm_add_epi16(low, high), _mm_set1_epi16(1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
}
INLINE F round_even(F x) { return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#else
constexpr bool kPortable = true, kManyRegisters = false;  // fewer kernel shapes: they compile slowly and gain nothing
typedef float f16v __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint8_t b64v __attribute__((vector_size(64)));
typedef uint8_t u8v __attribute__((vector_size(16)));
typedef int8_t s8v __attribute__((vector_size(16)));
struct F { f16v v; };
struct I { i16v v; };
struct B { b64v v; };

INLINE B load_bytes(const void* p) { B r; memcpy(&r.v, p, 64); return r; }
INLINE void store_bytes(void* p, B a) { memcpy(p, &a.v, 64); }
template <int shift, int mask, int to>
INLINE B field_to(B a) { return {((a.v >> shift) & uint8_t(mask)) << to}; }
INLINE B low_nibbles(B a) { return {a.v & uint8_t(15)}; }
INLINE B high_nibbles(B a) { return {a.v >> 4}; }
INLINE B either(B a, B b) { return {a.v | b.v}; }
INLINE B lookup(B index, const uint8_t* table) { B r; for (int i = 0; i < 64; i++) r.v[i] = table[index.v[i] & 15]; return r; }
struct A { const int8_t* v; };
INLINE A load_quad(const int8_t* p) { return {p}; }
template <bool wide>
INLINE I dot4(I acc, B weight, A quad) {
  const int8_t* act = quad.v;
  uint8_t w[64];
  memcpy(w, &weight.v, 64);
  for (int r = 0; r < 16; r++)
    acc.v[r] += w[4 * r] * act[0] + w[4 * r + 1] * act[1] + w[4 * r + 2] * act[2] + w[4 * r + 3] * act[3];
  return acc;
}
INLINE I splat(int32_t a) { return {a - i16v{}}; }
template <int n>
INLINE I shift_left(I a) { return {a.v << n}; }
INLINE F to_float(I a) { return {__builtin_convertvector(a.v, f16v)}; }
INLINE F splat(float a) { return {a - f16v{}}; }
INLINE F load(const float* p) { F r; memcpy(&r.v, p, 64); return r; }
INLINE void store(float* p, F a) { memcpy(p, &a.v, 64); }
INLINE F load_half(const void* p) { uint16_t h[16]; memcpy(h, p, 32); F r; for (int i = 0; i < 16; i++) r.v[i] = half_to_float(h[i]); return r; }
INLINE F load_u8(const void* p) { u8v x; memcpy(&x, p, 16); return {__builtin_convertvector(x, f16v)}; }
INLINE F load_s8(const void* p) { s8v x; memcpy(&x, p, 16); return {__builtin_convertvector(x, f16v)}; }
INLINE F mul(F a, F b) { return {a.v * b.v}; }
INLINE F add(F a, F b) { return {a.v + b.v}; }
INLINE F sub(F a, F b) { return {a.v - b.v}; }
INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
INLINE F div(F a, F b) { return {a.v / b.v}; }
INLINE float reduce_add(F a) { float s = 0; for (int i = 0; i < 16; i++) s += a.v[i]; return s; }
INLINE float reduce_max(F a) { float s = a.v[0]; for (int i = 1; i < 16; i++) s = a.v[i] > s ? a.v[i] : s; return s; }
INLINE F load_bf16(const void* p) { uint16_t h[16]; memcpy(h, p, 32); i16v w; for (int i = 0; i < 16; i++) w[i] = int32_t(uint32_t(h[i]) << 16); F r; memcpy(&r.v, &w, 64); return r; }
INLINE F keep_lanes(F a, int begin, int end, float other) { for (int i = 0; i < 16; i++) if (i < begin || i >= end) a.v[i] = other; return a; }
INLINE F exp2_scale(F p, F n) {
  for (int i = 0; i < 16; i++) { const float e = n.v[i] < -126.0f ? -126.0f : n.v[i]; const uint32_t b = uint32_t(int32_t(e) + 127) << 23; float one; memcpy(&one, &b, 4); p.v[i] *= one; }
  return p;
}
INLINE F round_even(F a) { for (int i = 0; i < 16; i++) a.v[i] = __builtin_rintf(a.v[i]); return a; }
INLINE float top_magnitude(F a, F b) {
  int32_t x[32], top = 0;
  memcpy(x, &a.v, 64);
  memcpy(x + 16, &b.v, 64);
  for (int i = 0; i < 32; i++) top = (x[i] & 0x7fffffff) > top ? x[i] & 0x7fffffff : top;
  float f;
  memcpy(&f, &top, 4);
  return f;
}
INLINE int32_t store_rounded(int8_t* p, F a) { int32_t sum = 0; for (int i = 0; i < 16; i++) { p[i] = int8_t(__builtin_rintf(a.v[i])); sum += p[i]; } return sum; }
#endif

// e^x, relative error below 2e-7 (Cephes' polynomial); x is clamped to [-87, 88]
INLINE F exp(F x) {
  x = max(splat(-87.0f), x);
  x = sub(splat(0.0f), max(sub(splat(0.0f), x), splat(-88.0f)));
  const F n = round_even(mul(x, splat(1.44269504088896341f)));
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.0f));
  return exp2_scale(p, n);
}
INLINE F tanh(F x) {  // 1 - 2 / (e^2x + 1)
  return sub(splat(1.0f), div(splat(2.0f), add(exp(add(x, x)), splat(1.0f))));
}

}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
