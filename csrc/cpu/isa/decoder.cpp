// Decoder layers inside one parallel run. Compiled once per instruction set.
//
// A layer: norm + quantize | q, k, v | head norms, rope, cache write | attention | quantize | output projection | residual,
// norm + quantize | gate, up | activation + quantize | down | residual. With experts: norm + quantize | router | choose | sort |
// gather | gate, up | activation + quantize | down | weighted sum. Threads meet at each bar; nothing is allocated.
// Rows of the batch are independent in every part, so a row's result does not depend on what it is batched with.
#include "../decoder.h"

#include "../team.h"
#include "attention.h"
#include "experts.h"
#include "families.h"
#include "precise.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

struct Thread {
  int index, count;
  int turns = 0;  // Pieces so far
  void share(int64_t n, int64_t& begin, int64_t& end) const {
    begin = n * index / count;
    end = n * (index + 1) / count;
  }
  void meet() const { team::barrier(count); }
};

// y = x / rms(x) * w; y may be x
void rms_norm(const float* x, const float* w, float* y, int64_t n, float eps) {
  F square = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F a = load(x + i);
    square = fma(a, a, square);
  }
  float sum = reduce_add(square);
  for (; i < n; i++) sum += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(sum / float(n) + eps);
  for (i = 0; i + 16 <= n; i += 16) store(y + i, mul(mul(load(x + i), splat(scale)), load(w + i)));
  for (; i < n; i++) y[i] = x[i] * scale * w[i];
}

// Turns the first n_rot elements of a head; table: n_rot / 2 cosines, then as many sines.
void rotate(float* x, const float* table, int n_rot, int kind) {
  const int half = n_rot / 2;
  for (int i = 0; i < half; i++) {
    const int a = kind == kRopeHalves ? i : 2 * i, b = kind == kRopeHalves ? i + half : 2 * i + 1;
    const float u = x[a], v = x[b];
    x[a] = u * table[i] - v * table[half + i];
    x[b] = u * table[half + i] + v * table[i];
  }
}

// Tiles of several matmuls, dealt out as one list of pairs so that threads stay even. A pair costs as much as its rows and,
// for its weights to come from memory, some rows more.
constexpr int64_t kReadingCost = 4;
struct Jobs {
  const Job* jobs;
  int64_t count, ldy;
  int layer_planes;

  int planes(const Job& job) const { return job.w->kernels->dense ? 1 : layer_planes; }
  int64_t cost(const Job& job) const { return job.m * planes(job) + kReadingCost; }
  int64_t pairs(const Job& job) const { return (job.w->tile_count() + 1) / 2; }
  int64_t total() const {
    int64_t sum = 0;
    for (int64_t j = 0; j < count; j++) sum += pairs(jobs[j]) * cost(jobs[j]);
    return sum;
  }
  // What lies between two sums of costs.
  void run(int64_t low, int64_t high) const {
    for (int64_t j = 0; j < count && high > 0; j++) {
      const int64_t all = pairs(jobs[j]), one = cost(jobs[j]);
      const auto pair_at = [&](int64_t at) { return at <= 0 ? 0 : at < all * one ? (at + one - 1) / one : all; };
      const int64_t begin = pair_at(low), end = pair_at(high);
      if (begin < end) run_pairs(jobs[j], begin, end);
      low -= all * one;
      high -= all * one;
    }
  }
  void run_pairs(const Job& job, int64_t begin, int64_t end) const {
    const Weight& w = *job.w;
    const int64_t tiles = w.tile_count(), first = 2 * begin, last = 2 * end < tiles ? 2 * end : tiles;
    w.kernels->matmul(job.tiles, w.k, job.acts, job.m * planes(job), job.y, ldy, first, last);
    if (planes(job) > 1) add_planes(job.y, ldy, job.m, planes(job), 16 * first, 16 * last);
    if (!w.bias) return;
    for (int64_t i = 0; i < job.m; i++)
      for (int64_t c = 16 * first; c < 16 * last && c < w.n; c++) job.y[i * ldy + c] += w.bias[c];
  }
};

template <CacheType C>
void write_token(const AttentionShape& a, const Cache& cache, int64_t slot, const float* k, const float* v) {
  const int64_t block = slot / 16;
  const int lane = int(slot % 16);
  for (int h = 0; h < a.kv_heads; h++) {
    const int64_t head = block * a.kv_heads + h;
    store_cache<C, true>(cache.keys + head * head_bytes<C>(a.key_length), lane, k + h * a.key_length, a.key_length);
    store_cache<C, false>(cache.values + head * head_bytes<C>(a.value_length), lane, v + h * a.value_length, a.value_length);
  }
}
void write_token(const AttentionShape& a, const Cache& cache, int64_t slot, const float* k, const float* v) {
  if (cache.type == kCacheF16) write_token<kCacheF16>(a, cache, slot, k, v);
  else if (cache.type == kCacheBF16) write_token<kCacheBF16>(a, cache, slot, k, v);
  else if (cache.type == kCacheQ8_0) write_token<kCacheQ8_0>(a, cache, slot, k, v);
  else write_token<kCacheF32>(a, cache, slot, k, v);
}

// The heads of one token: norms, rope, temperature, and keys and values to the cache.
void prepare_heads(const Layer& l, const Tokens& t, const Cache& cache, float* qkv, int64_t token) {
  const AttentionShape& a = l.attention;
  const float* table = l.rope_kind ? t.ropes[l.rope_index] + t.positions[token] * l.n_rot : nullptr;
  const int heads = a.heads + a.kv_heads;  // keys lie behind queries
  for (int h = 0; h < heads; h++) {
    float* x = qkv + h * a.key_length;
    const float* norm = h < a.heads ? l.q_norm : l.k_norm;
    if (norm) rms_norm(x, norm, x, a.key_length, l.eps);
    if (table) rotate(x, table, l.n_rot, l.rope_kind);
    if (l.temper && h < a.heads)
      for (int i = 0; i < a.key_length; i++) x[i] *= t.temperature[token];
  }
  const float* k = qkv + a.heads * a.key_length;
  write_token(a, cache, t.slots[token], k, k + a.kv_heads * a.key_length);
}

constexpr int kRowsAtOnce = 8;

// Row `row` of an item for query head h.
AttendRow row_of(const AttentionRun& run, const AttendItem& item, int row, int h) {
  const AttentionShape& a = *run.shape;
  const Tokens& t = *run.tokens;
  const int64_t token = t.query_start[item.seq] + row, chunks = (t.seq_lens[item.seq] + kChunk - 1) / kChunk;
  const int position = t.seq_lens[item.seq] - t.query_start[item.seq + 1] + int(token);
  const int64_t stride = a.value_length + kPartialExtra, pair = item.first + (row - item.row0) * chunks;
  return {run.q + token * run.ldq + h * a.key_length, run.y + token * run.ldy + h * a.value_length, position, run.sinks ? run.sinks + h : nullptr,
          run.partials ? run.partials + (pair * a.heads + h) * stride : nullptr, a.heads * stride};
}

// An item's rows and all query heads of one KV head, over a span of its keys.
template <CacheType C>
void attend_item(const AttentionRun& run, const AttendItem& item, int kv_head, const Span& span) {
  const AttentionShape& a = *run.shape;
  const Tokens& t = *run.tokens;
  const int group = a.heads / a.kv_heads;
  const PagedHead<C> head{a, run.cache->keys, run.cache->values, t.block_table + item.seq * t.max_blocks, kv_head, t.seq_lens[item.seq]};
  AttendRow rows[kRowsAtOnce];
  int n = 0;
  for (int row = item.row0; row < item.row1; row++)
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
      rows[n++] = row_of(run, item, row, h);
      if (n == kRowsAtOnce) {
        attend_rows(head, rows, n, span);
        n = 0;
      }
    }
  attend_rows(head, rows, n, span);
}

// Items by KV heads are handed out one after the other; cut into spans, their chunks' results are merged when all are there.
void attend(const AttentionRun& run, const Thread& thread) {
  const AttentionShape& a = *run.shape;
  const Tokens& t = *run.tokens;
  const int spans = attention_spans(t, a.kv_heads, run.threads), type = run.cache->type;
  const int64_t total = t.num_items * a.kv_heads * spans;
  for (int64_t i; (i = __atomic_fetch_add(run.next, 1, __ATOMIC_RELAXED)) < total;) {
    const AttendItem& item = t.items[i / spans / a.kv_heads];
    const int head = int(i / spans % a.kv_heads);
    const Span span = {int(i % spans), spans};
    if (type == kCacheF16) attend_item<kCacheF16>(run, item, head, span);
    else if (type == kCacheBF16) attend_item<kCacheBF16>(run, item, head, span);
    else if (type == kCacheQ8_0) attend_item<kCacheQ8_0>(run, item, head, span);
    else attend_item<kCacheF32>(run, item, head, span);
  }
  if (spans == 1) return;
  thread.meet();
  int64_t begin, end;
  thread.share(t.num_items * a.heads, begin, end);
  for (int64_t i = begin; i < end; i++) {
    const AttendItem& item = t.items[i / a.heads];
    for (int row = item.row0; row < item.row1; row++) merge_partials(a, row_of(run, item, row, int(i % a.heads)), t.seq_lens[item.seq]);
  }
}

void gate_row(float* gate, const float* up, int64_t n, int kind) {
  for (int64_t i = 0; i < n; i += 16) {
    const F g = load(gate + i);
    F y;
    if (kind == kGateSilu) {
      y = div(g, add(splat(1.0f), exp(sub(splat(0.0f), g))));
    } else {
      const F inner = mul(splat(0.7978845608028654f), fma(mul(mul(g, g), g), splat(0.044715f), g));
      y = mul(mul(splat(0.5f), g), add(splat(1.0f), tanh(inner)));
    }
    store(gate + i, mul(y, load(up + i)));
  }
}

int64_t record_bytes(const Weight& w) { return w.kernels->dense ? w.k * 4 : activation_bytes(w.k); }

struct LayerRun {
  Thread& thread;
  const Layer& l;
  const Tokens& t;
  const Buffers& b;
  const Cache& cache;
  float* hidden;
  int64_t length;
  int64_t* next;  // this layer's
  int64_t begin, end;  // this thread's tokens

  float* row() const { return b.rows + thread.index * 2 * b.ldrow; }
  int planes(const Weight& w) const { return w.kernels->dense ? 1 : l.planes; }
  // Row i of `rows` as the matmul of w takes it.
  void record(const float* x, const Weight& w, uint8_t* acts, int64_t i, int64_t rows) const {
    if (w.kernels->dense) memcpy(acts + i * w.k * 4, x, size_t(w.k) * 4);
    else quantize_planes(x, w.k, acts, i, rows, l.planes, row() + b.ldrow);
  }
  Job job(const Weight& w, float* y) const { return {&w, w.tiles, b.acts, y, t.num_tokens}; }
  void multiply(const Job* jobs, int64_t count, int64_t ldy) const {
    const Jobs all = {jobs, count, ldy, l.planes};
    thread.meet();
    team::Pieces pieces(all.total(), thread.index, thread.count, thread.turns++);
    for (int64_t low, high; pieces.next(low, high);) all.run(low, high);
    thread.meet();
  }
  void add(int64_t i, float* y, const float* post_norm) const {
    float* h = hidden + i * length;
    if (post_norm) rms_norm(y, post_norm, y, length, l.eps);
    for (int64_t c = 0; c < length; c++) h[c] += y[c];
  }

  void attention() const {
    const AttentionShape& a = l.attention;
    const int64_t k_at = int64_t(a.heads) * a.key_length, v_at = k_at + int64_t(a.kv_heads) * a.key_length;
    for (int64_t i = begin; i < end; i++) {
      rms_norm(hidden + i * length, l.attn_norm, row(), length, l.eps);
      record(row(), l.q, b.acts, i, t.num_tokens);
    }
    const Job jobs[] = {job(l.q, b.qkv), job(l.k, b.qkv + k_at), job(l.v, b.qkv + v_at)};
    multiply(jobs, l.k.kernels ? 3 : 1, b.ldqkv);
    for (int64_t i = begin; i < end; i++) prepare_heads(l, t, cache, b.qkv + i * b.ldqkv, i);
    thread.meet();
    attend({&a, &t, &cache, l.sinks, b.qkv, b.attn, b.ldqkv, b.ldattn, b.partials, b.threads, next}, thread);
    thread.meet();
    for (int64_t i = begin; i < end; i++) record(b.attn + i * b.ldattn, l.o, b.acts, i, t.num_tokens);
    const Job out = job(l.o, b.out);
    multiply(&out, 1, b.ldout);
    for (int64_t i = begin; i < end; i++) add(i, b.out + i * b.ldout, l.post_attn_norm);
  }

  void feed_forward() const {
    for (int64_t i = begin; i < end; i++) {
      rms_norm(hidden + i * length, l.ffn_norm, row(), length, l.eps);
      record(row(), l.gate, b.acts, i, t.num_tokens);
    }
    const Job jobs[] = {job(l.gate, b.ffn), job(l.up, b.ffn + l.down.k)};
    multiply(jobs, l.up.kernels ? 2 : 1, b.ldffn);
    for (int64_t i = begin; i < end; i++) {
      float* gate = b.ffn + i * b.ldffn;
      gate_row(gate, gate + l.down.k, l.down.k, l.gate_kind);
      record(gate, l.down, b.acts, i, t.num_tokens);
    }
    const Job down = job(l.down, b.out);
    multiply(&down, 1, b.ldout);
    for (int64_t i = begin; i < end; i++) add(i, b.out + i * b.ldout, l.post_ffn_norm);
  }

  // The rows of an expert's entries stand together, one plane of them after the other.
  int64_t entries(int expert) const { return b.entries.start[expert + 1] - b.entries.start[expert]; }
  int64_t row_of(int64_t entry, int planes) const {  // the first plane's
    const int64_t start = b.entries.start[b.entries.expert[entry]];
    return start * planes + entry - start;
  }
  void list(const Weight& w, float* y, int64_t ldy, const uint8_t* acts, Job* to) const {
    for (int e = 0; e < l.routing.experts; e++) {
      const int64_t first = int64_t(b.entries.start[e]) * planes(w), m = entries(e);
      if (m) *to++ = {&w, w.tiles + e * w.expert_bytes, acts + first * record_bytes(w), y + first * ldy, m};
    }
  }
  int64_t in_use() const {
    int64_t count = 0;
    for (int e = 0; e < l.routing.experts; e++) count += entries(e) > 0;
    return count;
  }

  void choose() const {
    const Routing& r = l.routing;
    for (int64_t i = begin; i < end; i++) {  // the router's rows lie where those of the entries will
      rms_norm(hidden + i * length, l.ffn_norm, row(), length, l.eps);
      record(row(), l.router, b.gathered, i, t.num_tokens);
      record(row(), l.gate, b.acts, i, t.num_tokens);
    }
    const Job router = {&l.router, l.router.tiles, b.gathered, b.logits, t.num_tokens};
    multiply(&router, 1, b.ldlogits);
    for (int64_t i = begin; i < end; i++) route(b.logits + i * b.ldlogits, r.experts, r, b.entries.ids + i * r.used, b.entries.weights + i * r.used);
    thread.meet();
    if (thread.index == 0) {
      sort_entries(b.entries.ids, t.num_tokens, r.used, r.experts, b.entries);
      list(l.gate, b.ffn, b.ldffn, b.gathered, b.jobs);
      list(l.up, b.ffn + l.down.k, b.ldffn, b.gathered, b.jobs + in_use());
    }
    thread.meet();
  }
  void gather(int64_t entry) const {
    const int64_t bytes = record_bytes(l.gate), token = b.entries.token[entry], m = entries(b.entries.expert[entry]);
    const int64_t to = row_of(entry, planes(l.gate));
    for (int p = 0; p < planes(l.gate); p++)
      memcpy(b.gathered + (to + p * m) * bytes, b.acts + (p * t.num_tokens + token) * bytes, size_t(bytes));
  }
  void experts() const {
    choose();
    const int used = l.routing.used;
    const int64_t count = in_use();
    int64_t first, last;
    thread.share(t.num_tokens * used, first, last);
    for (int64_t e = first; e < last; e++) gather(e);
    multiply(b.jobs, 2 * count, b.ldffn);
    for (int64_t e = first; e < last; e++) {
      const int expert = b.entries.expert[e], start = b.entries.start[expert];
      float* gate = b.ffn + row_of(e, planes(l.gate)) * b.ldffn;
      gate_row(gate, gate + l.down.k, l.down.k, l.gate_kind);
      record(gate, l.down, b.acts + int64_t(start) * planes(l.down) * record_bytes(l.down), e - start, entries(expert));
    }
    if (thread.index == 0) list(l.down, b.out, b.ldout, b.acts, b.jobs);
    multiply(b.jobs, count, b.ldout);
    for (int64_t i = begin; i < end; i++) {
      float* sum = row();
      for (int place = 0; place < used; place++) {
        const float* y = b.out + row_of(b.entries.slot[i * used + place], planes(l.down)) * b.ldout;
        const float weight = b.entries.weights[i * used + place];
        for (int64_t c = 0; c < length; c++) sum[c] = place ? sum[c] + weight * y[c] : weight * y[c];
      }
      add(i, sum, l.post_ffn_norm);
    }
  }
};

}  // namespace

void run_decoder(const DecoderRun& run, int index, int count) {
  Thread thread{index, count};
  int64_t begin, end;
  thread.share(run.tokens[0]->num_tokens, begin, end);
  for (int64_t i = 0; i < run.num_layers; i++) {
    const LayerRun layer{thread, *run.layers[i], *run.tokens[i], *run.buffers, run.caches[i], run.hidden, run.length,
                         run.buffers->next + i, begin, end};
    layer.attention();
    if (layer.l.routing.experts) layer.experts();
    else layer.feed_forward();
  }
}

void norm_rows(const float* x, const float* w, float* y, int64_t n, float eps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) rms_norm(x + i * n, w, y + i * n, n, eps);
}

void quantize_rows(const float* x, int64_t k, uint8_t* acts, int64_t rows, int planes, float* rest, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) quantize_planes(x + i * k, k, acts, i, rows, planes, rest);
}

void sum_planes(float* y, int64_t ldy, int64_t m, int planes, int64_t begin, int64_t end) { add_planes(y, ldy, m, planes, begin, end); }

void run_attention(const AttentionRun& run, int index, int count) { attend(run, {index, count}); }

void write_cache(const AttentionShape& a, const Cache& cache, const int64_t* slots, const float* k, const float* v, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    write_token(a, cache, slots[i], k + i * a.kv_heads * a.key_length, v + i * a.kv_heads * a.value_length);
}

}  // namespace ollamapy::OLLAMAPY_ISA
