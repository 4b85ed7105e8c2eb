// Paged attention over one sequence and one KV head.
//
// The keys of a row are taken in chunks of kChunk at absolute positions; each chunk is a softmax of its own that is merged
// into the running one in ascending order. So a row's result depends neither on the other rows nor on how rows were grouped.
#pragma once
#include "../decoder.h"
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

constexpr int kChunk = 256, kMaxHead = 256;
template <CacheType C> constexpr int kCacheBytes = C == kCacheF32 ? 4 : 2;
template <CacheType C>
INLINE F load_cache(const uint8_t* p) {
  if constexpr (C == kCacheF16) return load_half(p);
  else if constexpr (C == kCacheBF16) return load_bf16(p);
  else return load((const float*)p);
}
template <CacheType C>
INLINE void store_cache(uint8_t* p, int64_t stride, const float* x, int n) {  // n values, `stride` elements apart
  for (int i = 0; i < n; i++) {
    if constexpr (C == kCacheF32) memcpy(p + i * stride * 4, x + i, 4);
    else {
      uint16_t h;
      if constexpr (C == kCacheBF16) {
        uint32_t b;
        memcpy(&b, x + i, 4);
        h = uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
      } else {
#if defined(__F16C__)
        h = _cvtss_sh(x[i], 0);
#else
        h = float_to_half_bits(x[i]);
#endif
      }
      memcpy(p + i * stride * 2, &h, 2);
    }
  }
}

template <CacheType C>
struct PagedHead {  // the keys and values of one KV head of one sequence
  const AttentionShape& shape;
  const uint8_t *keys, *values;
  const int32_t* table;  // the sequence's blocks
  int head, length;      // length: tokens in the cache
};

struct AttendRow {
  const float* q;      // (key_length,)
  float* y;            // (value_length,)
  int position;        // absolute
  const float* sink;   // an extra logit in the denominator, or null
};

struct Running {  // softmax so far; the weighted sum of values stands in y, not yet divided
  float top, sum;
};

// Scores of R rows against NB consecutive blocks: each score is one chain of fused multiply-adds over d.
template <CacheType C, int R, int NB>
INLINE void scores(const float* const* q, const uint8_t* const* keys, int d, float* const* out) {
  F acc[R][NB];
  for (int r = 0; r < R; r++) for (int b = 0; b < NB; b++) acc[r][b] = splat(0.0f);
  for (int i = 0; i < d; i++) {
    F k[NB];
    for (int b = 0; b < NB; b++) k[b] = load_cache<C>(keys[b] + i * 16 * kCacheBytes<C>);
    for (int r = 0; r < R; r++) {
      const F x = splat(q[r][i]);
      for (int b = 0; b < NB; b++) acc[r][b] = fma(x, k[b], acc[r][b]);
    }
  }
  for (int r = 0; r < R; r++) for (int b = 0; b < NB; b++) store(out[r] + 16 * b, acc[r][b]);
}

template <CacheType C, int R, int NV>
INLINE void weigh(const float* const* p, const uint8_t* const* value_blocks, int first, int last, int dv, int v0, float* const* out) {
  F acc[R][NV];
  for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
  for (int j = first; j < last; j++) {
    const uint8_t* row = value_blocks[j / 16] + (j % 16 * dv + 16 * v0) * kCacheBytes<C>;
    F x[NV];
    for (int v = 0; v < NV; v++) x[v] = load_cache<C>(row + 16 * v * kCacheBytes<C>);
    for (int r = 0; r < R; r++) {
      const F w = splat(p[r][j]);
      for (int v = 0; v < NV; v++) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) store(out[r] + 16 * (v0 + v), acc[r][v]);
}

// Merges the softmax of a chunk (top, sum, part) into a row's.
INLINE void merge(Running& row, float* y, float top, float sum, const float* part, int n) {
  if (!(top > -__builtin_inff())) return;
  if (row.sum == 0.0f) {
    row = {top, sum};
    memcpy(y, part, size_t(n) * 4);
    return;
  }
  const float most = row.top > top ? row.top : top;
  alignas(64) float weight[16] = {row.top - most, top - most};
  store(weight, exp(load(weight)));
  row = {most, row.sum * weight[0] + sum * weight[1]};
  for (int i = 0; i < n; i += 16) store(y + i, fma(load(y + i), splat(weight[0]), mul(load(part + i), splat(weight[1]))));
}

// Softmax of a row's scores over `blocks` blocks, keys [low, high) of the chunk: scores become weights.
INLINE void soften(const AttentionShape& a, float* score, int blocks, int low, int high, float& top, float& sum) {
  F most = splat(-__builtin_inff());
  for (int b = 0; b < blocks; b++) {
    F s = mul(load(score + 16 * b), splat(a.scale));
    if (a.softcap > 0) s = mul(tanh(div(s, splat(a.softcap))), splat(a.softcap));
    s = keep_lanes(s, low - 16 * b, high - 16 * b, -__builtin_inff());
    store(score + 16 * b, s);
    most = max(most, s);
  }
  top = reduce_max(most);
  F total = splat(0.0f);
  for (int b = 0; b < blocks; b++) {
    F p = splat(0.0f);
    if (top > -__builtin_inff()) p = keep_lanes(exp(sub(load(score + 16 * b), splat(top))), low - 16 * b, high - 16 * b, 0.0f);
    store(score + 16 * b, p);
    total = add(total, p);
  }
  sum = reduce_add(total);
}

// R rows over keys [begin, end); row r sees keys [low[r], high[r]).
template <CacheType C, int R>
void attend_chunk(const PagedHead<C>& h, const AttendRow* rows, Running* running, const int* low, const int* high, int begin, int end) {
  constexpr int kScoreBlocks = R <= 2 ? 8 : R <= 4 ? 4 : 2, kValueVectors = kScoreBlocks;  // chains enough to hide latency
  const AttentionShape& a = h.shape;
  alignas(64) float score[R][kChunk];
  alignas(64) float part[R][kMaxHead];
  const uint8_t *keys[kChunk / 16], *values[kChunk / 16];
  const float *q[R], *weight[R];
  float *out[R], *parts[R], top[R], sum[R];
  const int blocks = (end - begin + 15) / 16;
  for (int b = 0; b < blocks; b++) {
    const int64_t id = int64_t(h.table[begin / 16 + b]) * a.kv_heads + h.head;
    keys[b] = h.keys + id * a.key_length * 16 * kCacheBytes<C>;
    values[b] = h.values + id * a.value_length * 16 * kCacheBytes<C>;
  }
  for (int r = 0; r < R; r++) q[r] = rows[r].q, weight[r] = score[r], parts[r] = part[r];
  for (int b = 0; b < blocks;) {
    for (int r = 0; r < R; r++) out[r] = score[r] + 16 * b;
    if (b + kScoreBlocks <= blocks) scores<C, R, kScoreBlocks>(q, keys + b, a.key_length, out), b += kScoreBlocks;
    else scores<C, R, 1>(q, keys + b, a.key_length, out), b += 1;
  }
  int first = end - begin, last = 0;
  for (int r = 0; r < R; r++) {
    const int l = low[r] > begin ? low[r] - begin : 0, g = high[r] < end ? high[r] - begin : end - begin;
    soften(a, score[r], blocks, l, g, top[r], sum[r]);
    first = l < first ? l : first;
    last = g > last ? g : last;
  }
  for (int v = 0; v < a.value_length / 16;) {
    if (v + kValueVectors <= a.value_length / 16) weigh<C, R, kValueVectors>(weight, values, first, last, a.value_length, v, parts), v += kValueVectors;
    else weigh<C, R, 1>(weight, values, first, last, a.value_length, v, parts), v += 1;
  }
  for (int r = 0; r < R; r++) merge(running[r], rows[r].y, top[r], sum[r], part[r], a.value_length);
}

template <CacheType C, int R>
void attend_block(const PagedHead<C>& h, const AttendRow* rows) {
  const AttentionShape& a = h.shape;
  Running running[R];
  int low[R], high[R], first = h.length, last = 0;
  for (int r = 0; r < R; r++) {
    running[r] = {-__builtin_inff(), 0.0f};
    // A window is the last keys, itself included; without causality, half of it on either side.
    const int p = rows[r].position, ahead = a.causal ? 0 : a.window > 0 ? a.window / 2 : h.length;
    const int behind = a.window == 0 ? p : a.causal ? a.window - 1 : a.window / 2;
    high[r] = ahead < h.length - p ? p + ahead + 1 : h.length;
    low[r] = behind < p ? p - behind : 0;
    first = low[r] < first ? low[r] : first;
    last = high[r] > last ? high[r] : last;
  }
  for (int begin = first / kChunk * kChunk; begin < last; begin += kChunk)
    attend_chunk<C, R>(h, rows, running, low, high, begin, begin + kChunk < last ? begin + kChunk : last);
  for (int r = 0; r < R; r++) {
    float sum = running[r].sum, scale = 1.0f;
    if (rows[r].sink) {
      const float most = running[r].top > *rows[r].sink ? running[r].top : *rows[r].sink;
      alignas(64) float weight[16] = {running[r].top - most, *rows[r].sink - most};
      store(weight, exp(load(weight)));
      scale = weight[0];
      sum = sum * weight[0] + weight[1];
    }
    const F inverse = splat(sum > 0 ? scale / sum : 0.0f);
    for (int i = 0; i < a.value_length; i += 16) store(rows[r].y + i, mul(load(rows[r].y + i), inverse));
  }
}

// n rows (at most 8) of one KV head, in the blocks of 8, 4, 3, 2, 1 that fit (portable: 1, the others compile slowly).
template <CacheType C>
INLINE void attend_rows(const PagedHead<C>& h, const AttendRow* rows, int n) {
  while (n > 0) {
    const int take = kPortable ? 1 : n >= 8 ? 8 : n >= 4 ? 4 : n;
    if constexpr (kPortable) attend_block<C, 1>(h, rows);
    else if (take == 8) attend_block<C, 8>(h, rows);
    else if (take == 4) attend_block<C, 4>(h, rows);
    else if (take == 3) attend_block<C, 3>(h, rows);
    else if (take == 2) attend_block<C, 2>(h, rows);
    else attend_block<C, 1>(h, rows);
    rows += take;
    n -= take;
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
