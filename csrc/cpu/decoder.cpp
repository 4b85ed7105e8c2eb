// Bindings of paged attention and of runs through decoder layers: checks before any pointer is followed, buffers, threads.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "kernels.h"
#include "layers.h"
#include "scratch.h"
#include "team.h"

namespace ollamapy {
namespace {

constexpr int64_t kQueryTile = 32;  // query rows of an attention item: they share the loads of keys and values

struct Paged {  // a batch over a cache, checked
  Tokens tokens{};
  std::vector<AttendItem> items;
  int64_t num_blocks = 0;
};

Cache checked_cache(const char* op, const Tensor& key, const Tensor& value, const AttentionShape& a, int64_t num_blocks) {
  const ScalarType type = key.scalar_type();
  check_type(op, "key cache", key, type, 4);
  check_type(op, "value cache", value, type, 4);
  STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), op, ": the cache is not contiguous");
  const bool q8 = type == ScalarType::Byte;
  STD_TORCH_CHECK(q8 || type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op, ": cache of another dtype");
  STD_TORCH_CHECK(!q8 || (a.key_length % 32 == 0 && a.value_length % 32 == 0), op, ": heads of ", a.key_length, " and ", a.value_length,
                  " are not whole blocks of q8_0");
  const auto fits = [&](const Tensor& t, int64_t rows, int64_t columns) {
    return t.size(0) == num_blocks && t.size(1) == a.kv_heads && t.size(2) == rows && t.size(3) == columns;
  };
  STD_TORCH_CHECK(q8 ? fits(key, a.key_length / 32, kQ8GroupBytes) : fits(key, a.key_length, 16), op, ": key cache is not that of ", num_blocks, " blocks, ",
                  a.kv_heads, " heads of ", a.key_length);
  STD_TORCH_CHECK(q8 ? fits(value, a.value_length / 32, kQ8GroupBytes) : fits(value, 16, a.value_length), op, ": value cache is not that of ", num_blocks,
                  " blocks, ", a.kv_heads, " heads of ", a.value_length);
  return {data<uint8_t>(key), data<uint8_t>(value),
          q8 ? kCacheQ8_0 : type == ScalarType::Half ? kCacheF16 : type == ScalarType::BFloat16 ? kCacheBF16 : kCacheF32};
}

// Head lengths as a cache has them: q8_0 keeps components by groups of 32.
int key_length_of(const Tensor& key) { return int(key.scalar_type() == ScalarType::Byte ? 32 * key.size(2) : key.size(2)); }
int value_length_of(const Tensor& value) { return int(value.scalar_type() == ScalarType::Byte ? 32 * value.size(2) : value.size(3)); }

// block_table (S, B) int32, query_start (S + 1) int32, seq_lens (S) int32: every block id and length is checked.
void fill_sequences(const char* op, Paged& p, int64_t num_tokens, const Tensor& block_table, const Tensor& query_start, const Tensor& seq_lens) {
  check_type(op, "block_table", block_table, ScalarType::Int, 2);
  STD_TORCH_CHECK(block_table.is_contiguous(), op, ": block_table is not contiguous");
  const int64_t seqs = block_table.size(0), blocks = block_table.size(1);
  check_vector(op, "query_start", query_start, ScalarType::Int, seqs + 1);
  check_vector(op, "seq_lens", seq_lens, ScalarType::Int, seqs);
  const int32_t *table = data<int32_t>(block_table), *start = data<int32_t>(query_start), *lens = data<int32_t>(seq_lens);
  STD_TORCH_CHECK(start[0] == 0 && start[seqs] == num_tokens, op, ": query_start does not span ", num_tokens, " tokens");
  for (int64_t s = 0; s < seqs; s++) {
    const int64_t rows = int64_t(start[s + 1]) - start[s], used = (int64_t(lens[s]) + 15) / 16;
    STD_TORCH_CHECK(rows >= 0 && rows <= lens[s] && used <= blocks, op, ": sequence ", s, " has ", rows, " rows, ", lens[s], " tokens and ", blocks, " blocks");
    for (int64_t b = 0; b < used; b++)
      STD_TORCH_CHECK(table[s * blocks + b] >= 0 && table[s * blocks + b] < p.num_blocks, op, ": block ", table[s * blocks + b], " is not one of ", p.num_blocks);
    const int64_t chunks = (int64_t(lens[s]) + kChunk - 1) / kChunk;
    for (int64_t row = 0; row < rows; row += kQueryTile) {
      const int64_t end = std::min(row + kQueryTile, rows);
      p.items.push_back({int32_t(s), int32_t(row), int32_t(end), p.tokens.pairs});
      p.tokens.pairs += (end - row) * chunks;
      p.tokens.most_rows = std::max(p.tokens.most_rows, end - row);
      p.tokens.most_chunks = std::max(p.tokens.most_chunks, chunks);
    }
  }
  // The longest work first, so that threads end together.
  std::stable_sort(p.items.begin(), p.items.end(), [&](const AttendItem& a, const AttendItem& b) {
    return int64_t(a.row1 - a.row0) * (lens[a.seq] - start[a.seq + 1] + start[a.seq] + a.row1) >
           int64_t(b.row1 - b.row0) * (lens[b.seq] - start[b.seq + 1] + start[b.seq] + b.row1);
  });
  p.tokens.num_tokens = num_tokens;
  p.tokens.num_seqs = seqs;
  p.tokens.max_blocks = blocks;
  p.tokens.block_table = table;
  p.tokens.query_start = start;
  p.tokens.seq_lens = lens;
  p.tokens.items = p.items.data();
  p.tokens.num_items = int64_t(p.items.size());
}

float* partials(int64_t floats) { return floats ? Scratch::floats(Scratch::kPartials, floats) : nullptr; }

void fill_slots(const char* op, Paged& p, const Tensor& slots, int64_t num_tokens) {
  check_vector(op, "slots", slots, ScalarType::Long, num_tokens);
  p.tokens.slots = data<int64_t>(slots);
  for (int64_t i = 0; i < num_tokens; i++)
    STD_TORCH_CHECK(p.tokens.slots[i] >= 0 && p.tokens.slots[i] < p.num_blocks * 16, op, ": slot ", p.tokens.slots[i], " is not one of ", p.num_blocks * 16);
}

void write_kv(Tensor k, Tensor v, Tensor key, Tensor value, Tensor slots) {
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "write_kv: the cache has not four dimensions");
  AttentionShape a{};
  a.heads = a.kv_heads = int(key.size(1));
  a.key_length = key_length_of(key);
  a.value_length = value_length_of(value);
  check_shape("write_kv", a);
  Paged p;
  p.num_blocks = key.size(0);
  const Cache cache = checked_cache("write_kv", key, value, a, p.num_blocks);
  const int64_t n = slots.size(0);
  fill_slots("write_kv", p, slots, n);
  for (const auto& [t, width] : {std::pair<const Tensor&, int64_t>{k, int64_t(a.kv_heads) * a.key_length}, {v, int64_t(a.kv_heads) * a.value_length}})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.size(0) >= n && t.numel() == t.size(0) * width, "write_kv: k or v is not (tokens, ", width, ") float32");
  team::share(n, 16, [&](int64_t begin, int64_t end) { kernels().write_cache(a, cache, p.tokens.slots, data<float>(k), data<float>(v), begin, end); });
}

// q (num_tokens, heads * key_length) float32 -> (num_tokens, heads * value_length)
Tensor attention(Tensor q, Tensor key, Tensor value, Tensor block_table, Tensor query_start, Tensor seq_lens, int64_t heads, double scale, double softcap,
                 int64_t window, bool causal, std::optional<Tensor> sinks) {
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "attention: the cache has not four dimensions");
  const AttentionShape a{int(heads), int(key.size(1)), key_length_of(key), value_length_of(value), float(scale), float(softcap), int(window), causal};
  check_shape("attention", a);
  check_type("attention", "q", q, ScalarType::Float, 2);
  STD_TORCH_CHECK(q.is_contiguous() && q.size(1) == heads * a.key_length, "attention: q is not (tokens, ", heads * a.key_length, ")");
  Paged p;
  p.num_blocks = key.size(0);
  const Cache cache = checked_cache("attention", key, value, a, p.num_blocks);
  fill_sequences("attention", p, q.size(0), block_table, query_start, seq_lens);
  if (sinks) check_vector("attention", "sinks", *sinks, ScalarType::Float, heads);
  Tensor out = torch::stable::empty({q.size(0), heads * a.value_length}, ScalarType::Float);
  const int size = team::size();
  int64_t next = 0;
  AttentionRun run{&a, &p.tokens, &cache, sinks ? data<float>(*sinks) : nullptr, data<float>(q), data<float>(out), heads * a.key_length,
                   heads * a.value_length, partials(partial_floats(p.tokens, a, size)), size, &next};
  const int threads = run.partials ? size : int(std::min<int64_t>(size, p.tokens.num_items * a.kv_heads));
  team::run(threads, [](void* argument, int index, int count) { kernels().attention(*static_cast<AttentionRun*>(argument), index, count); }, &run);
  return out;
}

Entries make_entries(int64_t tokens, int64_t used, int64_t experts) {
  const int64_t n = tokens * used;
  int32_t* p = reinterpret_cast<int32_t*>(Scratch::bytes(Scratch::kEntries, (experts + 1 + 5 * n) * 4));
  Entries e{};
  e.start = p;
  e.ids = p + experts + 1;
  e.slot = e.ids + n;
  e.token = e.slot + n;
  e.expert = e.token + n;
  e.weights = reinterpret_cast<float*>(e.expert + n);
  return e;
}

// For the widest of the layers. Rows are tokens, behind a router entries; quantized weights take each in so many planes.
Buffers make_buffers(const std::vector<const Layer*>& layers, const Tokens& batch, int64_t length) {
  Buffers b{};
  const int64_t tokens = batch.num_tokens;
  int64_t acts = 0, gathered = 0, used = 1, experts = 0, planes = 1, shared = 0;
  const auto bytes = [](const Layer& l, const Weight& w) { return w.kernels->dense ? w.k * 4 : l.planes * (w.k + w.k / 32 * 28); };
  b.ldrow = length;
  b.threads = team::size();
  for (const Layer* l : layers) {
    const AttentionShape& a = l->attention;
    const int64_t entries = l->routing.experts ? l->routing.used : 1;
    b.ldqkv = std::max<int64_t>(b.ldqkv, int64_t(a.heads + a.kv_heads) * a.key_length + int64_t(a.kv_heads) * a.value_length);
    b.ldattn = std::max(b.ldattn, l->o.k);
    b.ldffn = std::max(b.ldffn, 2 * l->down.k);
    b.ldrow = std::max({b.ldrow, l->o.k, l->down.k});
    for (const Weight* w : {&l->q, &l->o, &l->gate}) acts = std::max(acts, bytes(*l, *w));
    acts = std::max(acts, entries * bytes(*l, l->down));
    used = std::max(used, entries);
    planes = std::max<int64_t>(planes, l->planes);
    shared = std::max(shared, partial_floats(batch, a, b.threads));
    if (!l->routing.experts) continue;
    gathered = std::max({gathered, entries * bytes(*l, l->gate), bytes(*l, l->router)});
    experts = std::max<int64_t>(experts, l->routing.experts);
  }
  const int64_t rows = tokens * planes;
  b.ldout = (length + 15) / 16 * 16;
  b.acts = Scratch::bytes(Scratch::kActs, tokens * acts);
  b.qkv = Scratch::floats(Scratch::kQkv, rows * b.ldqkv);
  b.attn = Scratch::floats(Scratch::kAttn, tokens * b.ldattn);
  b.ffn = Scratch::floats(Scratch::kFfn, rows * used * b.ldffn);
  b.out = Scratch::floats(Scratch::kOut, rows * used * b.ldout);
  b.partials = partials(shared);
  b.rows = Scratch::floats(Scratch::kRows, b.threads * 2 * b.ldrow);
  if (!experts) return b;
  b.ldlogits = (experts + 15) / 16 * 16;
  b.gathered = Scratch::bytes(Scratch::kGathered, tokens * gathered);
  b.logits = Scratch::floats(Scratch::kLogits, rows * b.ldlogits);
  b.entries = make_entries(tokens, used, experts);
  b.jobs = reinterpret_cast<Job*>(Scratch::bytes(Scratch::kJobs, 2 * experts * int64_t(sizeof(Job))));
  return b;
}

// hidden (num_tokens, length) float32, updated in place; one key and value cache per layer
void decoder(std::vector<int64_t> handles, Tensor hidden, Tensor positions, std::vector<Tensor> slots, std::vector<Tensor> block_tables, Tensor query_start,
             Tensor seq_lens, std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<int64_t> groups, std::vector<Tensor> ropes,
             std::optional<Tensor> temperature) {
  const size_t count = handles.size();
  STD_TORCH_CHECK(count > 0 && keys.size() == count && values.size() == count && groups.size() == count, "decoder: layers, caches and groups differ in number");
  STD_TORCH_CHECK(!slots.empty() && slots.size() == block_tables.size(), "decoder: slots and block tables differ in number");
  int64_t length = 0;
  const std::vector<const Layer*> layers = find_layers(handles, length);
  check_type("decoder", "hidden", hidden, ScalarType::Float, 2);
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.size(1) == length, "decoder: hidden is not a contiguous (tokens, ", length, ")");
  const int64_t n = hidden.size(0);
  if (n == 0) return;
  check_vector("decoder", "positions", positions, ScalarType::Long, n);
  if (temperature) check_vector("decoder", "temperature", *temperature, ScalarType::Float, n);
  std::vector<Paged> paged(slots.size());  // by group; their items are equal
  for (size_t g = 0; g < paged.size(); g++) {
    paged[g].num_blocks = keys[0].size(0);
    fill_sequences("decoder", paged[g], n, block_tables[g], query_start, seq_lens);
    fill_slots("decoder", paged[g], slots[g], n);
    paged[g].tokens.positions = data<int64_t>(positions);
    paged[g].tokens.temperature = temperature ? data<float>(*temperature) : nullptr;
  }
  std::vector<const float*> tables;
  for (const Tensor& rope : ropes) {
    check_type("decoder", "rope", rope, ScalarType::Float, 2);
    STD_TORCH_CHECK(rope.is_contiguous(), "decoder: a rope table is not contiguous");
    for (int64_t i = 0; i < n; i++)
      STD_TORCH_CHECK(data<int64_t>(positions)[i] >= 0 && data<int64_t>(positions)[i] < rope.size(0), "decoder: position ", data<int64_t>(positions)[i], " beyond a rope table of ", rope.size(0));
    tables.push_back(data<float>(rope));
  }
  for (Paged& p : paged) p.tokens.ropes = tables.data();
  std::vector<Cache> caches;
  std::vector<const Tokens*> tokens;
  for (size_t i = 0; i < count; i++) {
    const Layer& l = *layers[i];
    caches.push_back(checked_cache("decoder", keys[i], values[i], l.attention, keys[0].size(0)));
    STD_TORCH_CHECK(groups[i] >= 0 && size_t(groups[i]) < paged.size(), "decoder: layer ", i, " is of group ", groups[i], " of ", paged.size());
    tokens.push_back(&paged[groups[i]].tokens);
    STD_TORCH_CHECK(!l.rope_kind || (size_t(l.rope_index) < ropes.size() && ropes[l.rope_index].size(1) == l.n_rot), "decoder: layer ", i, " has no rope table");
    STD_TORCH_CHECK(!l.temper || temperature, "decoder: layer ", i, " wants a temperature");
  }
  std::vector<int64_t> next(count);
  Buffers buffers = make_buffers(layers, *tokens[0], length);
  buffers.next = next.data();
  DecoderRun run{layers.data(), caches.data(), int64_t(count), tokens.data(), &buffers, data<float>(hidden), length};
  team::run(buffers.threads, [](void* argument, int index, int threads) { kernels().decoder(*static_cast<DecoderRun*>(argument), index, threads); }, &run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("decoder", TORCH_BOX(&decoder));
}
}  // namespace ollamapy
