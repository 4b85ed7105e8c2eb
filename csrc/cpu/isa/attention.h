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

INLINE uint16_t half_bits(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  return float_to_half_bits(x);
#endif
}
INLINE float half_value(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return half_bits_to_float(h);
#endif
}

// 32 values as one block of Q8_0: the scale is max|x| / 127 as a half, and the quants are rounded to multiples of that half,
// so that no value is off by more than half a step. An infinity or a NaN makes the scale that.
INLINE void quantize_q8_0(const float* x, int8_t q[32], uint16_t* scale) {
  const F low = load(x), high = load(x + 16);
  *scale = half_bits(top_magnitude(low, high) / 127.0f);
  const float step = half_value(*scale);
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
          h = uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
        } else {
          h = half_bits(x[d]);
        }
        memcpy(at(d), &h, 2);
      }
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
  const auto step = [&](int i, const F* scale) {
    F k[NB];
    for (int b = 0; b < NB; b++) {
      k[b] = load_cache<C>(keys[b] + key_at<C>(i, 0));
      if constexpr (C == kCacheQ8_0) k[b] = mul(k[b], scale[b]);
    }
    for (int r = 0; r < R; r++) {
      const F x = splat(q[r][i]);
      for (int b = 0; b < NB; b++) acc[r][b] = fma(x, k[b], acc[r][b]);
    }
  };
  if constexpr (C == kCacheQ8_0) {
    for (int g = 0; g < d; g += 32) {
      F scale[NB];
      for (int b = 0; b < NB; b++) scale[b] = load_half(keys[b] + g / 32 * kQ8GroupBytes + 512);
      for (int i = g; i < g + 32; i++) step(i, scale);
    }
  } else {
    for (int i = 0; i < d; i++) step(i, nullptr);
  }
  for (int r = 0; r < R; r++) for (int b = 0; b < NB; b++) store(out[r] + 16 * b, acc[r][b]);
}

// Sums of NV vectors of value components, from component 16 v0 on, weighted by p, over keys [first, last) of the chunk.
template <CacheType C, int R, int NV>
INLINE void weigh(const float* const* p, const uint8_t* const* value_blocks, int first, int last, int dv, int v0, float* const* out) {
  constexpr int kGroups = C == kCacheQ8_0 ? (NV + 1) / 2 : 1;  // q8_0: a weight times the scale of each group
  alignas(64) float scaled[C == kCacheQ8_0 ? R : 1][kGroups][C == kCacheQ8_0 ? kChunk : 1];
  if constexpr (C == kCacheQ8_0)
    for (int b = first / 16; b < (last + 15) / 16; b++)
      for (int g = 0; g < kGroups; g++) {
        const F scale = load_half(value_blocks[b] + (v0 / 2 + g) * kQ8GroupBytes + 512);
        for (int r = 0; r < R; r++) store(scaled[r][g] + 16 * b, mul(load(p[r] + 16 * b), scale));
      }
  F acc[R][NV];
  for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
  for (int j = first; j < last; j++) {
    const uint8_t* block = value_blocks[j / 16];
    F x[NV];
    for (int v = 0; v < NV; v++) x[v] = load_cache<C>(block + value_at<C>(16 * (v0 + v), j % 16, dv));
    for (int r = 0; r < R; r++) {
      if constexpr (C == kCacheQ8_0) {
        for (int v = 0; v < NV; v++) acc[r][v] = fma(splat(scaled[r][v / 2][j]), x[v], acc[r][v]);
      } else {
        const F w = splat(p[r][j]);
        for (int v = 0; v < NV; v++) acc[r][v] = fma(w, x[v], acc[r][v]);
      }
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
    keys[b] = h.keys + id * head_bytes<C>(a.key_length);
    values[b] = h.values + id * head_bytes<C>(a.value_length);
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
  constexpr int kRest = C == kCacheQ8_0 ? 2 : 1;  // a group of q8_0 is two vectors
  for (int v = 0; v < a.value_length / 16;) {
    if (v + kValueVectors <= a.value_length / 16) weigh<C, R, kValueVectors>(weight, values, first, last, a.value_length, v, parts), v += kValueVectors;
    else weigh<C, R, kRest>(weight, values, first, last, a.value_length, v, parts), v += kRest;
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
