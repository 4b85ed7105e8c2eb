// y[m][n] = sum_k w[n][k] x[m][k] on packed tiles and int8 activations.
//
// The dot of a group of 32 k is an exact integer. Floats are accumulated over groups in ascending order with the same
// two (or four) fused operations per group in every kernel below, so a row of y does not depend on M.
#pragma once
#include "quantize.h"
#include "scales.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// What the arithmetic of a group depends on: types that agree in it share their kernels for unpacked panels.
template <int zero_log2, bool has_min, bool per16, bool wide>
struct Arithmetic {
  static constexpr int kZeroLog2 = zero_log2;
  static constexpr bool kMin = has_min, kHalves = per16, kWide = wide;
};
template <class T> using ArithmeticOf = Arithmetic<T::kZeroLog2, T::kMin, T::kHalves, T::kWide>;

// acc[r] += the group's contribution for R tiles: THE order of float operations
template <class T, int R>
INLINE void accumulate(F* acc, const B w[][8], const GroupScales* s, const Activation& a, int64_t g) {
  const F scale = splat(a.scale[g]);
  I dot[R];
  if constexpr (T::kHalves) {
    for (int h = 0; h < 2; h++) {
      const I start = T::kZeroLog2 >= 0 ? shift_left<T::kZeroLog2 >= 0 ? T::kZeroLog2 : 0>(splat(a.neg16[2 * g + h])) : splat(0);
      for (int r = 0; r < R; r++) dot[r] = start;
      for (int i = 0; i < 4; i++) {
        const A quad = load_quad(a.q + 32 * g + 16 * h + 4 * i);
        for (int r = 0; r < R; r++) dot[r] = dot4<T::kWide>(dot[r], w[r][4 * h + i], quad);
      }
      for (int r = 0; r < R; r++) {
        acc[r] = fma(to_float(dot[r]), mul(s[r].scale[h], scale), acc[r]);
        if constexpr (T::kMin) acc[r] = fma(s[r].min[h], splat(a.sum16[2 * g + h]), acc[r]);
      }
    }
  } else {
    const I start = T::kZeroLog2 >= 0 ? shift_left<T::kZeroLog2 >= 0 ? T::kZeroLog2 : 0>(splat(a.neg32[g])) : splat(0);
    // Two sums of 4 quads each: 8 dots in a row, which wait 4 cycles for each other, left a tenth of a panel's time unused.
    I second[R];
    for (int r = 0; r < R; r++) dot[r] = start, second[r] = splat(0);
    for (int i = 0; i < 4; i++) {
      const A low = load_quad(a.q + 32 * g + 4 * i), high = load_quad(a.q + 32 * g + 16 + 4 * i);
      for (int r = 0; r < R; r++) {
        dot[r] = dot4<T::kWide>(dot[r], w[r][i], low);
        if constexpr (kManyRegisters) second[r] = dot4<T::kWide>(second[r], w[r][i + 4], high);
        else dot[r] = dot4<T::kWide>(dot[r], w[r][i + 4], high);
      }
    }
    for (int r = 0; r < R; r++) {
      if constexpr (kManyRegisters) dot[r] = add(dot[r], second[r]);
      acc[r] = fma(to_float(dot[r]), mul(s[r].scale[0], scale), acc[r]);
      if constexpr (T::kMin) acc[r] = fma(s[r].min[0], splat(a.sum32[g]), acc[r]);
    }
  }
}

// Bytes ahead that are asked for: at 36 GB/s memory's 200 ns are 7 KB.
constexpr int kAhead = 8192;

// A whole chunk at once, in the order of its addresses: the same requests spread over the arithmetic were answered at 32 GB/s
// instead of 36 (one thread), those of two tiles side by side at 21, for the CPU's own prefetcher follows the first only.
// `once`: weights that are used once pass the caches by, and what else is in them stays (3 % of a step of a 1B model).
template <class T, bool once>
INLINE void prefetch_chunk(const uint8_t* at) {
  for (int i = 0; i < T::kChunkBytes; i += 64) __builtin_prefetch(at + i, 0, once ? 0 : 3);
}

template <class T, int M>
INLINE void direct_group(const Chunk<T>& chunk, int g, int64_t group, const Activation* a, F acc[M][1]) {
  B w[1][8];
  unpack_group<T>(chunk.group(g), w[0]);
  const GroupScales scales[1] = {group_scales<T>(chunk.record(g), g % T::kBlockGroups)};
  for (int m = 0; m < M; m++) accumulate<ArithmeticOf<T>, 1>(acc[m], w, scales, a[m], group);
}

// M rows straight from the packed tile: weights are read once, decode is bound by memory.
template <class T, int M>
INLINE void direct(const uint8_t* tile, int64_t k, const Activation* a, float* y, int64_t ldy) {
  const int64_t groups = k / 32;
  F acc[M][1];
  for (int m = 0; m < M; m++) acc[m][0] = splat(0.0f);
  int64_t group = 0;
  for (; group + kChunkGroups <= groups; group += kChunkGroups, tile += T::kChunkBytes) {
    prefetch_chunk<T, M == 1>(tile + kAhead);
    const Chunk<T> chunk(tile, kChunkGroups);
#pragma GCC unroll 8
    for (int g = 0; g < kChunkGroups; g++)  // unrolled so that the scale fields of a block are found at compile time
      direct_group<T, M>(chunk, g, group + g, a, acc);
  }
  if constexpr (T::kBlockGroups < kChunkGroups) {
    const int rest = int(groups - group);
    if (rest) prefetch_chunk<T, M == 1>(tile + kAhead);
    const Chunk<T> chunk(tile, rest);
    for (int g = 0; g < rest; g++) direct_group<T, M>(chunk, g, group + g, a, acc);
  }
  for (int m = 0; m < M; m++) store(y + m * ldy, acc[m][0]);
}

// Tiles that share the loads of activations. 16 registers do not hold two.
constexpr int kTilesAtOnce = kManyRegisters ? 2 : 1;

// Unpacked panel of some tiles and up to kPanelGroups groups, small enough for L1/L2.
constexpr int kPanelGroups = 16, kPanelTiles = kTilesAtOnce;
struct alignas(64) Panel {
  uint8_t w[kPanelGroups][kPanelTiles][8][64];
  float scale[kPanelGroups][kPanelTiles][2][16];
  float min[kPanelGroups][kPanelTiles][2][16];
};

// Groups from `group_begin`, the first of a chunk.
template <class T>
INLINE void fill_panel(Panel& p, const uint8_t* tile, int64_t tile_bytes, int tiles, int64_t group_begin, int groups) {
  const int64_t end = group_begin + groups;
  for (int r = 0; r < tiles; r++) {
    for (int64_t first = group_begin; first < end; first += kChunkGroups) {
      const uint8_t* at = tile + r * tile_bytes + first / kChunkGroups * T::kChunkBytes;
      const int count = int(end - first < kChunkGroups ? end - first : kChunkGroups);
      const Chunk<T> chunk(at, count);
      for (int g = 0; g < count; g++) {
        const int64_t to = first - group_begin + g;
        B w[8];
        unpack_group<T>(chunk.group(g), w);
        for (int i = 0; i < 8; i++) store_bytes(p.w[to][r][i], w[i]);
        const GroupScales scales = group_scales<T>(chunk.record(g), g % T::kBlockGroups);
        for (int h = 0; h < (T::kHalves ? 2 : 1); h++) {
          store(p.scale[to][r][h], scales.scale[h]);
          if constexpr (T::kMin) store(p.min[to][r][h], scales.min[h]);
        }
      }
    }
  }
}

// The bytes that the next panel is made of, of each of its tiles. They are asked for a few lines at a time while this one is
// multiplied: all at once they fill the core's list of open reads, and it waits (Q8_0, 16 rows, out of memory: 160 GMAC/s, so 290).
struct Ahead {
  const uint8_t *at, *end;
  int64_t tile_bytes;
  int lines;  // of each tile for a group of a pass
  // From `tile`, after groups [begin, end) of `groups`, of which a panel takes `passes` passes.
  template <class T>
  static INLINE Ahead after(const uint8_t* tile, int64_t tile_bytes, int64_t begin, int64_t end, int64_t groups, int64_t passes) {
    const bool wraps = end == groups;  // on to the next tiles
    const int64_t left = wraps ? groups : groups - end, take = left < kPanelGroups ? left : kPanelGroups;
    const uint8_t* at = tile + (wraps ? kPanelTiles * tile_bytes : end / kChunkGroups * T::kChunkBytes);
    const int64_t bytes = take * T::kChunkBytes / kChunkGroups, steps = passes * (end - begin);
    return {at, at + bytes, tile_bytes, int((bytes / 64 + steps - 1) / steps)};
  }
};

template <class Kind, int M, int R>
INLINE void panel_rows(const Panel& p, int64_t group_begin, int groups, const Activation* a, float* y, int64_t ldy, bool first, Ahead ahead) {
  F acc[M][R];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[m][r] = first ? splat(0.0f) : load(y + m * ldy + 16 * r);
  for (int g = 0; g < groups; g++) {
    B w[R][8];
    GroupScales s[R];
    for (int r = 0; r < R; r++) {
      for (int i = 0; i < 8; i++) w[r][i] = load_bytes(p.w[g][r][i]);
      for (int h = 0; h < (Kind::kHalves ? 2 : 1); h++) {
        s[r].scale[h] = load(p.scale[g][r][h]);
        if constexpr (Kind::kMin) s[r].min[h] = load(p.min[g][r][h]);
      }
    }
    for (int i = 0; i < ahead.lines; i++, ahead.at += 64)
      for (int r = 0; r < kPanelTiles; r++) __builtin_prefetch(ahead.at + r * ahead.tile_bytes, 0, 2);
    for (int m = 0; m < M; m++) accumulate<Kind, R>(acc[m], w, s, a[m], group_begin + g);
  }
  for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) store(y + m * ldy + 16 * r, acc[m][r]);
}

// Wide or half-group types spill registers above 4 rows: 1.07 ms against 0.64 ms for Q8_0 at 8 rows of 8192 x 2048.
template <class T> constexpr int kDirectRows = !kManyRegisters || T::kBase == 8 || T::kHalves ? 4 : 8;
constexpr int kRowBlock = 128;   // rows of x that stay in L2 while the tiles of a thread pass

// The unpacked panel of tiles [t, t + count) for groups [g0, g0 + span), over all rows of x from m0 to m1.
template <class Kind>
void panel_pass(const Panel& panel, int64_t k, const uint8_t* acts, int64_t m0, int64_t m1, float* y, int64_t ldy, int count, int64_t g0, int span, Ahead ahead) {
  const int64_t act_bytes = activation_bytes(k);
  const bool first = g0 == 0;
  int rows = 0;
  for (int64_t i = m0; i < m1; i += rows, ahead.at += 64 * ahead.lines * span) {
    if (ahead.at >= ahead.end) ahead.lines = 0;
    rows = kPortable || m1 - i < 4 ? 1 : 4;
    Activation a[4];
    for (int j = 0; j < rows; j++) a[j] = activation(acts + (i + j) * act_bytes, k);
    float* out = y + i * ldy;
    if constexpr (!kPortable)
      if (rows == 4 && count == kTilesAtOnce) { panel_rows<Kind, 4, kTilesAtOnce>(panel, g0, span, a, out, ldy, first, ahead); continue; }
    if constexpr (kTilesAtOnce > 1) {
      if (rows == 4) { panel_rows<Kind, 4, 1>(panel, g0, span, a, out, ldy, first, ahead); continue; }
      if (count == kTilesAtOnce) { panel_rows<Kind, 1, kTilesAtOnce>(panel, g0, span, a, out, ldy, first, ahead); continue; }
    }
    panel_rows<Kind, 1, 1>(panel, g0, span, a, out, ldy, first, ahead);
  }
}

template <class T>
void few_rows(const uint8_t* tiles, int64_t k, const uint8_t* acts, int64_t m, float* y, int64_t ldy, int64_t tile_begin, int64_t tile_end) {
  const int64_t tile_bytes = 16 * (k / T::kBlock) * T::kBlockBytes;
  Activation a[kDirectRows<T>];
  for (int i = 0; i < m; i++) a[i] = activation(acts + i * activation_bytes(k), k);
  for (int64_t t = tile_begin; t < tile_end; t++) {
    const uint8_t* tile = tiles + t * tile_bytes;
    float* out = y + 16 * t;
    int i = 0;
    if constexpr (kDirectRows<T> >= 8)
      for (; i + 8 <= m; i += 8) direct<T, 8>(tile, k, a + i, out + i * ldy, ldy);
    for (; i + 4 <= m; i += 4) direct<T, 4>(tile, k, a + i, out + i * ldy, ldy);
    for (; i + 2 <= m; i += 2) direct<T, 2>(tile, k, a + i, out + i * ldy, ldy);
    for (; i < m; i++) direct<T, 1>(tile, k, a + i, out + i * ldy, ldy);
  }
}

template <class T>
void matmul_tiles(const uint8_t* tiles, int64_t k, const uint8_t* acts, int64_t m, float* y, int64_t ldy, int64_t tile_begin, int64_t tile_end) {
  if constexpr (!kPortable)
    if (m <= kDirectRows<T>) return few_rows<T>(tiles, k, acts, m, y, ldy, tile_begin, tile_end);
  static thread_local Panel panel;
  const int64_t tile_bytes = 16 * (k / T::kBlock) * T::kBlockBytes, groups = k / 32;
  for (int64_t m0 = 0; m0 < m; m0 += kRowBlock) {
    const int64_t m1 = m0 + kRowBlock < m ? m0 + kRowBlock : m;
    for (int64_t t = tile_begin; t < tile_end; t += kPanelTiles) {
      const int count = int(tile_end - t < kPanelTiles ? tile_end - t : kPanelTiles);
      for (int64_t g0 = 0; g0 < groups; g0 += kPanelGroups) {
        const int span = int(g0 + kPanelGroups < groups ? kPanelGroups : groups - g0);
        const uint8_t* tile = tiles + t * tile_bytes;
        fill_panel<T>(panel, tile, tile_bytes, count, g0, span);
        const Ahead ahead = Ahead::after<T>(tile, tile_bytes, g0, g0 + span, groups, (m1 - m0 + 3) / 4);
        panel_pass<ArithmeticOf<T>>(panel, k, acts, m0, m1, y + 16 * t, ldy, count, g0, span, ahead);
      }
    }
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
