/* What the machine can do at most: reading memory, and int8 dot products in registers. One thread; the caller starts several. */
#include <stdint.h>
#include <immintrin.h>

/* Sum of n 64-byte lines, one after another, the lines 8 KB ahead asked for: of what was tried the fastest way to read. */
int64_t read_lines(const int8_t* buffer, int64_t n) {
#ifdef __AVX512F__
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i < n * 64; i += 256) {
    for (int j = 0; j < 256; j += 64) _mm_prefetch((const char*)buffer + i + 8192 + j, _MM_HINT_NTA);
    a = _mm512_add_epi64(a, _mm512_loadu_si512(buffer + i));
    b = _mm512_add_epi64(b, _mm512_loadu_si512(buffer + i + 64));
    c = _mm512_add_epi64(c, _mm512_loadu_si512(buffer + i + 128));
    d = _mm512_add_epi64(d, _mm512_loadu_si512(buffer + i + 192));
  }
  return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
#else
  const int64_t* words = (const int64_t*)buffer;
  int64_t sum = 0;
  for (int64_t i = 0; i < n * 8; i++) sum += words[i];
  return sum;
#endif
}

/* Multiply-adds done by `rounds` rounds of 16 independent vpdpbusd of 64 bytes; 0 where the CPU has no AVX-512 VNNI.
   Written as instructions: from the intrinsic gcc 12 makes two copies of registers for each product. */
int64_t dot_rounds(int64_t rounds) {
#ifdef __AVX512VNNI__
  __m512i sums[16], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sums[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(x), "v"(y));
  }
  __m512i total = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < 16; i++) total = _mm512_add_epi32(total, sums[i]);
  volatile int kept = _mm512_reduce_add_epi32(total);
  (void)kept;
  return rounds * 16 * 64;
#else
  return 0;
#endif
}
