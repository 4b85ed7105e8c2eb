// y[m][n] = sum_k w[n][k] x[m][k] for float weights (F32, F16, BF16) on tiles of 16 rows, laid out (k, 16 rows).
//
// Each output is one chain of fused multiply-adds over ascending k, at every M: a row of y does not depend on the others.
#pragma once
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

struct DenseF32 { static constexpr int kBytes = 4; static INLINE F get(const uint8_t* p) { return load((const float*)p); } };
struct DenseF16 { static constexpr int kBytes = 2; static INLINE F get(const uint8_t* p) { return load_half(p); } };
struct DenseBF16 { static constexpr int kBytes = 2; static INLINE F get(const uint8_t* p) { return load_bf16(p); } };

template <class T, int M, int R>
INLINE void dense_block(const uint8_t* tile, int64_t tile_bytes, int64_t k, const float* x, float* y, int64_t ldy) {
  F acc[M][R];
  for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) acc[m][r] = splat(0.0f);
  for (int64_t i = 0; i < k; i++) {
    F w[R];
    for (int r = 0; r < R; r++) w[r] = T::get(tile + r * tile_bytes + i * 16 * T::kBytes);
    for (int m = 0; m < M; m++) {
      const F xi = splat(x[m * k + i]);
      for (int r = 0; r < R; r++) acc[m][r] = fma(w[r], xi, acc[m][r]);
    }
  }
  for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) store(y + m * ldy + 16 * r, acc[m][r]);
}

// Two tiles at once: a single chain of additions waits 4 cycles for each step. More read memory slower (see `prefetch_chunk`).
template <class T>
void dense_tiles(const uint8_t* tiles, int64_t k, const uint8_t* acts, int64_t m, float* y, int64_t ldy, int64_t tile_begin, int64_t tile_end) {
  const float* x = (const float*)acts;
  const int64_t tile_bytes = k * 16 * T::kBytes;
  int64_t t = tile_begin;
  while (t < tile_end) {
    const uint8_t* tile = tiles + t * tile_bytes;
    int64_t i = 0;
    const int wide = tile_end - t >= 2 ? 2 : 1;
    if (wide == 2) {
      for (; i + 8 <= m; i += 8) dense_block<T, 8, 2>(tile, tile_bytes, k, x + i * k, y + i * ldy + 16 * t, ldy);
      for (; i + 4 <= m; i += 4) dense_block<T, 4, 2>(tile, tile_bytes, k, x + i * k, y + i * ldy + 16 * t, ldy);
      for (; i < m; i++) dense_block<T, 1, 2>(tile, tile_bytes, k, x + i * k, y + i * ldy + 16 * t, ldy);
    } else {
      for (; i + 4 <= m; i += 4) dense_block<T, 4, 1>(tile, tile_bytes, k, x + i * k, y + i * ldy + 16 * t, ldy);
      for (; i < m; i++) dense_block<T, 1, 1>(tile, tile_bytes, k, x + i * k, y + i * ldy + 16 * t, ldy);
    }
    t += wide;
  }
}

template <class T>
void unpack_dense(const uint8_t* tiles, int64_t k, int64_t row, uint8_t* out) {
  const uint8_t* from = tiles + (row / 16 * k * 16 + row % 16) * T::kBytes;
  for (int64_t i = 0; i < k; i++) memcpy(out + i * T::kBytes, from + i * 16 * T::kBytes, T::kBytes);
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
