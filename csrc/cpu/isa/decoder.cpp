// Decoder layers inside one parallel run. Compiled once per instruction set.
//
// A layer: norm + quantize | q, k, v | head norms, rope, cache write | attention | quantize | output projection | residual,
// norm + quantize | gate, up | activation + quantize | down | residual. Threads meet at each bar; nothing is allocated.
// Rows of the batch are independent in every part, so a row's result does not depend on what it is batched with.
#include "../decoder.h"

#include "../team.h"
#include "attention.h"
#include "families.h"
#include "quantize.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

struct Thread {
  int index, count;
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

// Tiles of several weights over the same activations, shared out as one list of pairs so that threads stay even.
struct Job {
  const Weight* w;
  float* y;
};
void matmul_jobs(const Thread& thread, const Job* jobs, int count, const uint8_t* acts, int64_t m, int64_t ldy) {
  int64_t total = 0, begin, end;
  for (int j = 0; j < count; j++) total += (jobs[j].w->tile_count() + 1) / 2;
  thread.share(total, begin, end);
  for (int j = 0; j < count; j++) {
    const Weight& w = *jobs[j].w;
    const int64_t tiles = w.tile_count(), pairs = (tiles + 1) / 2;
    const int64_t b = begin < 0 ? 0 : begin, e = end < pairs ? end : pairs;
    begin -= pairs;
    end -= pairs;
    if (b >= e) continue;
    const int64_t first = 2 * b, last = 2 * e < tiles ? 2 * e : tiles;
    w.kernels->matmul(w.tiles, w.k, acts, m, jobs[j].y, ldy, first, last);
    if (!w.bias) continue;
    for (int64_t i = 0; i < m; i++)
      for (int64_t c = 16 * first; c < 16 * last && c < w.n; c++) jobs[j].y[i * ldy + c] += w.bias[c];
  }
}

template <CacheType C>
void write_token(const AttentionShape& a, const Cache& cache, int64_t slot, const float* k, const float* v) {
  const int64_t block = slot / 16, lane = slot % 16;
  for (int h = 0; h < a.kv_heads; h++) {
    const int64_t head = block * a.kv_heads + h;
    store_cache<C>(cache.keys + (head * a.key_length * 16 + lane) * kCacheBytes<C>, 16, k + h * a.key_length, a.key_length);
    store_cache<C>(cache.values + (head * 16 + lane) * a.value_length * kCacheBytes<C>, 1, v + h * a.value_length, a.value_length);
  }
}
void write_token(const AttentionShape& a, const Cache& cache, int64_t slot, const float* k, const float* v) {
  if (cache.type == kCacheF16) write_token<kCacheF16>(a, cache, slot, k, v);
  else if (cache.type == kCacheBF16) write_token<kCacheBF16>(a, cache, slot, k, v);
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

// Query rows [row0, row1) of a sequence and all query heads of one KV head. q: (tokens, ldq); y: (tokens, ldy).
template <CacheType C>
void attend_item(const AttentionShape& a, const Tokens& t, const Cache& cache, const float* sinks, const float* q, int64_t ldq, float* y,
                 int64_t ldy, const AttendItem& item, int kv_head) {
  const int group = a.heads / a.kv_heads, length = t.seq_lens[item.seq];
  const int64_t start = t.query_start[item.seq];
  const int first = length - int(t.query_start[item.seq + 1] - start);
  const PagedHead<C> head{a, cache.keys, cache.values, t.block_table + item.seq * t.max_blocks, kv_head, length};
  AttendRow rows[kRowsAtOnce];
  int n = 0;
  for (int row = item.row0; row < item.row1; row++)
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
      rows[n++] = {q + (start + row) * ldq + h * a.key_length, y + (start + row) * ldy + h * a.value_length, first + row,
                   sinks ? sinks + h : nullptr};
      if (n == kRowsAtOnce) {
        attend_rows(head, rows, n);
        n = 0;
      }
    }
  attend_rows(head, rows, n);
}

void attend(const AttentionShape& a, const Tokens& t, const Cache& cache, const float* sinks, const float* q, int64_t ldq, float* y,
            int64_t ldy, int64_t* next) {
  const int64_t total = t.num_items * a.kv_heads;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < total;) {
    const AttendItem& item = t.items[i / a.kv_heads];
    const int head = int(i % a.kv_heads);
    if (cache.type == kCacheF16) attend_item<kCacheF16>(a, t, cache, sinks, q, ldq, y, ldy, item, head);
    else if (cache.type == kCacheBF16) attend_item<kCacheBF16>(a, t, cache, sinks, q, ldq, y, ldy, item, head);
    else attend_item<kCacheF32>(a, t, cache, sinks, q, ldq, y, ldy, item, head);
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

// A row as the next matmul takes it.
void record(const float* x, int64_t k, const Weight& w, uint8_t* acts, int64_t i) {
  if (w.kernels->dense) memcpy(acts + i * k * 4, x, size_t(k) * 4);
  else quantize_row(x, k, acts + i * activation_bytes(k));
}

struct LayerRun {
  const Thread& thread;
  const Layer& l;
  const Tokens& t;
  const Buffers& b;
  const Cache& cache;
  float* hidden;
  int64_t length;
  float* row;     // this thread's
  int64_t* next;  // this layer's
  int64_t begin, end;  // this thread's tokens

  void norm(const float* w, const Weight& into) const {
    for (int64_t i = begin; i < end; i++) {
      rms_norm(hidden + i * length, w, row, length, l.eps);
      record(row, length, into, b.acts, i);
    }
  }
  void residual(const float* post_norm) const {
    for (int64_t i = begin; i < end; i++) {
      float *h = hidden + i * length, *y = b.out + i * b.ldout;
      if (post_norm) rms_norm(y, post_norm, y, length, l.eps);
      for (int64_t c = 0; c < length; c++) h[c] += y[c];
    }
  }
  void attention() const {
    const AttentionShape& a = l.attention;
    const int64_t k_at = int64_t(a.heads) * a.key_length, v_at = k_at + int64_t(a.kv_heads) * a.key_length;
    norm(l.attn_norm, l.q);
    thread.meet();
    const Job jobs[] = {{&l.q, b.qkv}, {&l.k, b.qkv + k_at}, {&l.v, b.qkv + v_at}};
    matmul_jobs(thread, jobs, l.k.kernels ? 3 : 1, b.acts, t.num_tokens, b.ldqkv);
    thread.meet();
    for (int64_t i = begin; i < end; i++) prepare_heads(l, t, cache, b.qkv + i * b.ldqkv, i);
    thread.meet();
    attend(a, t, cache, l.sinks, b.qkv, b.ldqkv, b.attn, b.ldattn, next);
    thread.meet();
    for (int64_t i = begin; i < end; i++) record(b.attn + i * b.ldattn, l.o.k, l.o, b.acts, i);
    thread.meet();
    const Job out[] = {{&l.o, b.out}};
    matmul_jobs(thread, out, 1, b.acts, t.num_tokens, b.ldout);
    thread.meet();
    residual(l.post_attn_norm);
  }
  void feed_forward() const {
    norm(l.ffn_norm, l.gate);
    thread.meet();
    const Job jobs[] = {{&l.gate, b.ffn}, {&l.up, b.ffn + l.down.k}};
    matmul_jobs(thread, jobs, l.up.kernels ? 2 : 1, b.acts, t.num_tokens, b.ldffn);
    thread.meet();
    for (int64_t i = begin; i < end; i++) {
      float* gate = b.ffn + i * b.ldffn;
      gate_row(gate, gate + l.down.k, l.down.k, l.gate_kind);
      record(gate, l.down.k, l.down, b.acts, i);
    }
    thread.meet();
    const Job down[] = {{&l.down, b.out}};
    matmul_jobs(thread, down, 1, b.acts, t.num_tokens, b.ldout);
    thread.meet();
    residual(l.post_ffn_norm);
  }
};

}  // namespace

void run_decoder(const DecoderRun& run, int index, int count) {
  const Thread thread{index, count};
  int64_t begin, end;
  thread.share(run.tokens[0]->num_tokens, begin, end);
  float* row = run.buffers->rows + index * run.length;
  for (int64_t i = 0; i < run.num_layers; i++) {
    const LayerRun layer{thread, *run.layers[i], *run.tokens[i], *run.buffers, run.caches[i], run.hidden, run.length, row,
                         run.buffers->next + i, begin, end};
    layer.attention();
    layer.feed_forward();
  }
}

void norm_rows(const float* x, const float* w, float* y, int64_t n, float eps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) rms_norm(x + i * n, w, y + i * n, n, eps);
}

void quantize_rows(const float* x, int64_t ldx, int64_t k, uint8_t* acts, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) quantize_row(x + i * ldx, k, acts + i * activation_bytes(k));
}

void run_attention(const AttentionShape& a, const Tokens& t, const Cache& cache, const float* sinks, const float* q, float* y, int64_t* next) {
  attend(a, t, cache, sinks, q, int64_t(a.heads) * a.key_length, y, int64_t(a.heads) * a.value_length, next);
}

void write_cache(const AttentionShape& a, const Cache& cache, const int64_t* slots, const float* k, const float* v, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    write_token(a, cache, slots[i], k + i * a.kv_heads * a.key_length, v + i * a.kv_heads * a.value_length);
}

}  // namespace ollamapy::OLLAMAPY_ISA
