// Sixteen rows side by side: dwords, halves and bytes of 16 rows become vectors with a row in each lane.
#pragma once
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// out[v]: dword v of the 16 bytes at each of 16 rows, `stride` bytes apart.
INLINE void load_quads(const uint8_t* rows, int64_t stride, B out[4]) {
#if defined(__AVX512VNNI__)
  __m512i d[4];
  for (int i = 0; i < 4; i++) {
    const uint8_t* p = rows + i * stride;
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 4 * stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 8 * stride)), 2);
    d[i] = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 12 * stride)), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(d[0], d[1]), b = _mm512_unpacklo_epi32(d[2], d[3]);
  const __m512i c = _mm512_unpackhi_epi32(d[0], d[1]), e = _mm512_unpackhi_epi32(d[2], d[3]);
  out[0].v = _mm512_unpacklo_epi64(a, b);
  out[1].v = _mm512_unpackhi_epi64(a, b);
  out[2].v = _mm512_unpacklo_epi64(c, e);
  out[3].v = _mm512_unpackhi_epi64(c, e);
#elif defined(__AVX2__)
  __m256i half[2][4];
  for (int h = 0; h < 2; h++) {
    __m256i d[4];
    for (int i = 0; i < 4; i++) {
      const uint8_t* p = rows + (8 * h + i) * stride;
      d[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)), _mm_loadu_si128((const __m128i*)(p + 4 * stride)), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(d[0], d[1]), b = _mm256_unpacklo_epi32(d[2], d[3]);
    const __m256i c = _mm256_unpackhi_epi32(d[0], d[1]), e = _mm256_unpackhi_epi32(d[2], d[3]);
    half[h][0] = _mm256_unpacklo_epi64(a, b);
    half[h][1] = _mm256_unpackhi_epi64(a, b);
    half[h][2] = _mm256_unpacklo_epi64(c, e);
    half[h][3] = _mm256_unpackhi_epi64(c, e);
  }
  for (int v = 0; v < 4; v++) out[v] = {half[0][v], half[1][v]};
#else
  uint8_t lanes[4][64];
  for (int r = 0; r < 16; r++)
    for (int v = 0; v < 4; v++) memcpy(lanes[v] + 4 * r, rows + r * stride + 4 * v, 4);
  for (int v = 0; v < 4; v++) out[v] = load_bytes(lanes[v]);
#endif
}

// Lanes of two halves -> the 16 first halves, then the 16 second ones.
INLINE B split_halves(B x) {
#if defined(__AVX512VNNI__)
  const __m512i low_high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_shuffle_epi8(x.v, low_high))};
#elif defined(__AVX2__)
  const __m256i low_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m256i a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x.a, low_high), 0xd8), b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x.b, low_high), 0xd8);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
#else
  uint16_t from[32], to[32];
  memcpy(from, &x.v, 64);
  for (int i = 0; i < 32; i++) to[i] = from[i % 16 * 2 + i / 16];
  return load_bytes(to);
#endif
}

// Signed bytes -> unsigned, and back.
INLINE B flip_signs(B x) {
#if defined(__AVX512VNNI__)
  return {_mm512_xor_si512(x.v, _mm512_set1_epi8(char(0x80)))};
#elif defined(__AVX2__)
  return {_mm256_xor_si256(x.a, _mm256_set1_epi8(char(0x80))), _mm256_xor_si256(x.b, _mm256_set1_epi8(char(0x80)))};
#else
  return {x.v ^ uint8_t(0x80)};
#endif
}

}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
