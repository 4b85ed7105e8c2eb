// Paged attention over one sequence and one KV head.
//
// The keys of a row are taken in chunks of kChunk at absolute positions; each chunk is a softmax of its own that is merged
// into the running one in ascending order. So a row's result depends neither on the other rows nor on how rows were grouped.
#pragma once
#include "cache.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

constexpr int kMaxHead = 256;

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
  float* partials;     // of its chunks, `stride` floats apart, where they are shared out
  int64_t stride;
};

struct Span {  // the index-th of so many equal parts of an item's chunks
  int index, count;
};

// What a chunk reads, in that order: the keys of its blocks, their values, and the first keys of the chunk behind it. Blocks lie
// anywhere, and the 2 to 8 KB of one are over before the CPU's own prefetcher has learned where they are: without asking ahead a
// thread reads 10 GB/s.
constexpr int kAheadBytes = 8192, kMostAhead = 16;
struct Reads {
  const uint8_t* parts[2 * kChunk / 16 + kMostAhead];
  int count = 0, asked;  // asked: so many of the parts
  int64_t bytes;         // of the larger parts

  INLINE void ask(int end) {
    for (; asked < end && asked < count; asked++)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(parts[asked] + at);
  }
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

// Sums of NV vectors of value components, from component d0 on, weighted by p, over keys [first, last) of the chunk.
template <CacheType C, int R, int NV, class Next>
INLINE void weigh(const float* const* p, const uint8_t* const* value_blocks, int first, int last, int dv, int d0, float* const* out, const Next& next) {
  constexpr int kGroups = C == kCacheQ8_0 ? (NV + 1) / 2 : 1;  // q8_0: a weight times the scale of each group
  alignas(64) float scaled[C == kCacheQ8_0 ? R : 1][kGroups][C == kCacheQ8_0 ? kChunk : 1];
  if constexpr (C == kCacheQ8_0)
    for (int b = first / 16; b < (last + 15) / 16; b++)
      for (int g = 0; g < kGroups; g++) {
        const F scale = load_half(value_blocks[b] + (d0 / 32 + g) * kQ8GroupBytes + 512);
        for (int r = 0; r < R; r++) store(scaled[r][g] + 16 * b, mul(load(p[r] + 16 * b), scale));
      }
  F acc[R][NV];
  for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
  for (int j = first; j < last; j++) {
    const uint8_t* block = value_blocks[j / 16];
    if (j % 16 == 0) next(j / 16);
    F x[NV];
    for (int v = 0; v < NV; v++) x[v] = load_cache<C>(block + value_at<C>(d0 + 16 * v, j % 16, dv));
    for (int r = 0; r < R; r++) {
      if constexpr (C == kCacheQ8_0) {
        for (int v = 0; v < NV; v++) acc[r][v] = fma(splat(scaled[r][v / 2][j]), x[v], acc[r][v]);
      } else {
        const F w = splat(p[r][j]);
        for (int v = 0; v < NV; v++) acc[r][v] = fma(w, x[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) store(out[r] + d0 + 16 * v, acc[r][v]);
}

// Where `width` components from the d-th on begin, so that none lies beyond n: the last vectors of a head that is no multiple of
// them overlap those before, and what is computed twice is the same.
INLINE int within(int d, int width, int n) { return d + width <= n ? d : n - width; }

// y[i] = value(i) by vectors, also where value reads y; n >= 16.
template <class Value>
INLINE void each_vector(float* y, int n, const Value& value) {
  const F last = value(n - 16);
  for (int i = 0; i + 16 <= n; i += 16) store(y + i, value(i));
  store(y + n - 16, last);
}

INLINE bool finite(const float* x, int n) {
  F wrong = splat(0.0f);  // becomes NaN
  for (int i = 0; i < n; i += 16) wrong = fma(load(x + within(i, 16, n)), splat(0.0f), wrong);
  return reduce_add(wrong) == 0.0f;
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
  each_vector(y, n, [&](int i) { return fma(load(y + i), splat(weight[0]), mul(load(part + i), splat(weight[1]))); });
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

// R rows over keys [begin, end); row r sees keys [low[r], high[r]). Gives the softmax of the chunk: the rows' largest scores, sums and
// weighted values. asked: how many of the first blocks' keys are on their way; becomes that of the next chunk.
template <CacheType C, int R>
void attend_chunk(const PagedHead<C>& h, const AttendRow* rows, float* const* parts, float* top, float* sum, const int* low, const int* high, int begin,
                  int end, int& asked) {
  constexpr int kScoreBlocks = R <= 2 ? 8 : R <= 4 ? 4 : 2, kValueVectors = kScoreBlocks;  // chains enough to hide latency
  const AttentionShape& a = h.shape;
  alignas(64) float score[R][kChunk];
  const float *q[R], *weight[R];
  float* out[R];
  const int blocks = (end - begin + 15) / 16;
  const int64_t key_bytes = head_bytes<C>(a.key_length), value_bytes = head_bytes<C>(a.value_length);
  Reads reads;
  reads.asked = asked;
  reads.bytes = key_bytes > value_bytes ? key_bytes : value_bytes;
  const int ahead = int(kAheadBytes / reads.bytes < 1 ? 1 : kAheadBytes / reads.bytes < kMostAhead ? kAheadBytes / reads.bytes : kMostAhead);
  const auto block = [&](int b) { return int64_t(h.table[begin / 16 + b]) * a.kv_heads + h.head; };
  const uint8_t **keys = reads.parts, **values = reads.parts + blocks;
  for (int b = 0; b < blocks; b++) {
    keys[b] = h.keys + block(b) * key_bytes;
    values[b] = h.values + block(b) * value_bytes;
  }
  reads.count = 2 * blocks;
  for (int b = blocks; b < blocks + ahead && begin + 16 * b < h.length; b++) reads.parts[reads.count++] = h.keys + block(b) * key_bytes;
  for (int r = 0; r < R; r++) q[r] = rows[r].q, weight[r] = score[r];
  for (int b = 0; b < blocks;) {
    for (int r = 0; r < R; r++) out[r] = score[r] + 16 * b;
    reads.ask(b + (b + kScoreBlocks <= blocks ? kScoreBlocks : 1) + ahead);
    if (b + kScoreBlocks <= blocks) scores<C, R, kScoreBlocks>(q, keys + b, a.key_length, out), b += kScoreBlocks;
    else scores<C, R, 1>(q, keys + b, a.key_length, out), b += 1;
  }
  int first = end - begin, last = 0, from[R], to[R];
  for (int r = 0; r < R; r++) {
    from[r] = low[r] > begin ? low[r] - begin : 0;
    to[r] = high[r] < end ? high[r] - begin : end - begin;
    soften(a, score[r], blocks, from[r], to[r], top[r], sum[r]);
    first = from[r] < first ? from[r] : first;
    last = to[r] > last ? to[r] : last;
  }
  constexpr int kRest = C == kCacheQ8_0 ? 2 : 1;  // a group of q8_0 is two vectors
  const auto next = [&](int b) { reads.ask(blocks + b + 1 + ahead); };
  const int dv = a.value_length;
  for (int d = 0; d < dv;) {
    if (d + 16 * kValueVectors <= dv) weigh<C, R, kValueVectors>(weight, values, first, last, dv, d, parts, next), d += 16 * kValueVectors;
    else weigh<C, R, kRest>(weight, values, first, last, dv, within(d, 16 * kRest, dv), parts, next), d += 16 * kRest;
  }
  if constexpr (R > 1) {  // a weight of 0 times another row's infinity is NaN: what is not finite is done again over the row's own keys
    for (int r = 0; r < R; r++) {
      if (finite(parts[r], dv)) continue;
      for (int d = 0; d < dv; d += 16 * kRest) weigh<C, 1, kRest>(weight + r, values, from[r], to[r], dv, within(d, 16 * kRest, dv), parts + r, next);
    }
  }
  reads.ask(reads.count);
  asked = reads.count - 2 * blocks;
}

// The keys [low, high) that a row sees. A window is the last keys, itself included; without causality, half of it on either side.
INLINE void visible(const AttentionShape& a, int length, int position, int& low, int& high) {
  const int ahead = a.causal ? 0 : a.window > 0 ? a.window / 2 : length;
  const int behind = a.window == 0 ? position : a.causal ? a.window - 1 : a.window / 2;
  high = ahead < length - position ? position + ahead + 1 : length;
  low = behind < position ? position - behind : 0;
}

// Divides a row's sum of values by that of its weights, the sink's included.
INLINE void finish(const AttendRow& row, const Running& running, int n) {
  float sum = running.sum, scale = 1.0f;
  if (row.sink) {
    const float most = running.top > *row.sink ? running.top : *row.sink;
    alignas(64) float weight[16] = {running.top - most, *row.sink - most};
    store(weight, exp(load(weight)));
    scale = weight[0];
    sum = sum * weight[0] + weight[1];
  }
  const F inverse = splat(sum > 0 ? scale / sum : 0.0f);
  each_vector(row.y, n, [&](int i) { return mul(load(row.y + i), inverse); });
}

// A row from the partial results of all its chunks: the same merges in the same order as where one thread had them all.
INLINE void merge_partials(const AttentionShape& a, const AttendRow& row, int length) {
  int low, high;
  visible(a, length, row.position, low, high);
  Running running = {-__builtin_inff(), 0.0f};
  for (int chunk = low / kChunk; chunk * kChunk < high; chunk++) {
    const float* part = row.partials + chunk * row.stride;
    merge(running, row.y, part[a.value_length], part[a.value_length + 1], part, a.value_length);
  }
  finish(row, running, a.value_length);
}

template <CacheType C, int R>
void attend_block(const PagedHead<C>& h, const AttendRow* rows, const Span& span) {
  const AttentionShape& a = h.shape;
  alignas(64) float part[R][kMaxHead];
  Running running[R];
  float *parts[R], top[R], sum[R];
  int low[R], high[R], first = h.length, last = 0;
  for (int r = 0; r < R; r++) {
    running[r] = {-__builtin_inff(), 0.0f};
    parts[r] = part[r];
    visible(a, h.length, rows[r].position, low[r], high[r]);
    first = low[r] < first ? low[r] : first;
    last = high[r] > last ? high[r] : last;
  }
  const int from = first / kChunk, count = (last + kChunk - 1) / kChunk - from;
  const int stop = from + int(int64_t(count) * (span.index + 1) / span.count);
  int asked = 0;
  for (int chunk = from + int(int64_t(count) * span.index / span.count); chunk < stop; chunk++) {
    const int begin = chunk * kChunk, end = begin + kChunk < last ? begin + kChunk : last;
    if (span.count > 1)
      for (int r = 0; r < R; r++) parts[r] = rows[r].partials + chunk * rows[r].stride;
    attend_chunk<C, R>(h, rows, parts, top, sum, low, high, begin, end, asked);
    for (int r = 0; r < R; r++) {
      if (span.count == 1) merge(running[r], rows[r].y, top[r], sum[r], parts[r], a.value_length);
      else parts[r][a.value_length] = top[r], parts[r][a.value_length + 1] = sum[r];
    }
  }
  if (span.count > 1) return;
  for (int r = 0; r < R; r++) finish(rows[r], running[r], a.value_length);
}

// n rows (at most 8) of one KV head, in the blocks of 8, 4, 3, 2, 1 that fit (portable: 1, the others compile slowly).
template <CacheType C>
INLINE void attend_rows(const PagedHead<C>& h, const AttendRow* rows, int n, const Span& span) {
  while (n > 0) {
    const int take = kPortable ? 1 : n >= 8 ? 8 : n >= 4 ? 4 : n;
    if constexpr (kPortable) attend_block<C, 1>(h, rows, span);
    else if (take == 8) attend_block<C, 8>(h, rows, span);
    else if (take == 4) attend_block<C, 4>(h, rows, span);
    else if (take == 3) attend_block<C, 3>(h, rows, span);
    else if (take == 2) attend_block<C, 2>(h, rows, span);
    else attend_block<C, 1>(h, rows, span);
    rows += take;
    n -= take;
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
