// Bindings of paged attention and of whole decoder layers: checks before any pointer is followed, buffers, threads.
#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace ollamapy {
namespace {

constexpr int64_t kQueryTile = 32;  // query rows of an attention item: they share the loads of keys and values

template <class T>
T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t size) {
  check_type(op, name, t, type, 1);
  STD_TORCH_CHECK(t.size(0) == size && t.is_contiguous(), op, ": ", name, " is not a contiguous (", size, ")");
}

struct Paged {  // a batch over a cache, checked
  Tokens tokens{};
  std::vector<AttendItem> items;
  int64_t num_blocks = 0;
};

Cache checked_cache(const char* op, const Tensor& key, const Tensor& value, const AttentionShape& a, int64_t num_blocks) {
  check_type(op, "key cache", key, key.scalar_type(), 4);
  check_type(op, "value cache", value, key.scalar_type(), 4);
  STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), op, ": the cache is not contiguous");
  STD_TORCH_CHECK(key.size(0) == num_blocks && key.size(1) == a.kv_heads && key.size(2) == a.key_length && key.size(3) == 16, op,
                  ": key cache is not (", num_blocks, ", ", a.kv_heads, ", ", a.key_length, ", 16)");
  STD_TORCH_CHECK(value.size(0) == num_blocks && value.size(1) == a.kv_heads && value.size(2) == 16 && value.size(3) == a.value_length, op,
                  ": value cache is not (", num_blocks, ", ", a.kv_heads, ", 16, ", a.value_length, ")");
  const ScalarType type = key.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op, ": cache of another dtype");
  return {data<uint8_t>(key), data<uint8_t>(value), type == ScalarType::Half ? kCacheF16 : type == ScalarType::BFloat16 ? kCacheBF16 : kCacheF32};
}

void check_shape(const char* op, const AttentionShape& a) {
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, ": ", a.heads, " heads on ", a.kv_heads, " KV heads");
  STD_TORCH_CHECK(a.key_length > 0 && a.key_length % 16 == 0 && a.key_length <= 256 && a.value_length > 0 && a.value_length % 16 == 0 && a.value_length <= 256, op,
                  ": head lengths ", a.key_length, " and ", a.value_length, " are not multiples of 16 up to 256");
  STD_TORCH_CHECK(a.window >= 0, op, ": window ", a.window, " is negative");
}

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
    for (int64_t row = 0; row < rows; row += kQueryTile) p.items.push_back({int32_t(s), int32_t(row), int32_t(std::min(row + kQueryTile, rows))});
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
  a.key_length = int(key.size(2));
  a.value_length = int(value.size(3));
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
  const AttentionShape a{int(heads), int(key.size(1)), int(key.size(2)), int(value.size(3)), float(scale), float(softcap), int(window), causal};
  check_shape("attention", a);
  check_type("attention", "q", q, ScalarType::Float, 2);
  STD_TORCH_CHECK(q.is_contiguous() && q.size(1) == heads * a.key_length, "attention: q is not (tokens, ", heads * a.key_length, ")");
  Paged p;
  p.num_blocks = key.size(0);
  const Cache cache = checked_cache("attention", key, value, a, p.num_blocks);
  fill_sequences("attention", p, q.size(0), block_table, query_start, seq_lens);
  if (sinks) check_vector("attention", "sinks", *sinks, ScalarType::Float, heads);
  Tensor out = torch::stable::empty({q.size(0), heads * a.value_length}, ScalarType::Float);
  struct Call { const AttentionShape& a; const Tokens& t; const Cache& cache; const float *sinks, *q; float* y; int64_t next; };
  Call call{a, p.tokens, cache, sinks ? data<float>(*sinks) : nullptr, data<float>(q), data<float>(out), 0};
  team::run(int(std::min<int64_t>(team::size(), p.tokens.num_items * a.kv_heads)), [](void* argument, int, int) {
    Call& c = *static_cast<Call*>(argument);
    kernels().attention(c.a, c.t, c.cache, c.sinks, c.q, c.y, &c.next);
  }, &call);
  return out;
}

struct OwnedLayer {
  Layer layer{};
  std::vector<Tensor> owned;
  int64_t length;
};

struct Registry {
  std::mutex lock;
  std::unordered_map<int64_t, std::unique_ptr<OwnedLayer>> layers;
  int64_t last = 0;
};
Registry& registry() {
  static Registry r;
  return r;
}

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kParts };
enum Vector { kAttnNorm, kPostAttnNorm, kFfnNorm, kPostFfnNorm, kQNorm, kKNorm, kSinks, kVectors };
enum Fact { kHeads, kKvHeads, kKeyLength, kValueLength, kWindow, kCausal, kRot, kRope, kRopeIndex, kGateKind, kTemper, kFacts };

void add_weight(OwnedLayer& to, Weight& w, const Tensor& tiles, int64_t type, int64_t n, int64_t k, const Tensor& bias) {
  if (tiles.numel() == 0) return;
  w.kernels = kernels().matmul(type);
  STD_TORCH_CHECK(w.kernels, "layer_new: no kernel for tensor type ", type);
  STD_TORCH_CHECK(n > 0 && n % 16 == 0 && k > 0 && k % w.kernels->block == 0 && k % 16 == 0, "layer_new: weight of shape (", n, ", ", k, ")");
  check_type("layer_new", "tiles", tiles, ScalarType::Byte, 2);
  STD_TORCH_CHECK(tiles.is_contiguous() && tiles.size(0) == n / 16 && tiles.size(1) == 16 * (k / w.kernels->block * w.kernels->block_bytes), "layer_new: tiles of another shape");
  w.tiles = data<uint8_t>(tiles);
  w.n = n;
  w.k = k;
  to.owned.push_back(tiles);
  if (bias.numel() == 0) return;
  check_vector("layer_new", "bias", bias, ScalarType::Float, n);
  w.bias = data<float>(bias);
  to.owned.push_back(bias);
}

void check_widths(const Layer& l, int64_t length) {
  const AttentionShape& a = l.attention;
  const int64_t q = int64_t(a.heads) * a.key_length, k = int64_t(a.kv_heads) * a.key_length, v = int64_t(a.kv_heads) * a.value_length, f = l.down.k;
  const bool joined = l.q.n == q + k + v && !l.k.kernels && !l.v.kernels;
  const bool apart = l.q.n == q && l.k.n == k && l.v.n == v && l.k.k == length && l.v.k == length;
  STD_TORCH_CHECK((joined || apart) && l.q.k == length && l.o.k == int64_t(a.heads) * a.value_length && l.o.n == length, "layer_new: attention weights do not fit");
  const bool gates = l.up.kernels ? l.gate.n == f && l.up.n == f && l.up.k == length : l.gate.n == 2 * f;
  STD_TORCH_CHECK(gates && l.gate.k == length && l.down.n == length, "layer_new: feed-forward weights do not fit");
  const auto same = [](const Weight& x, const Weight& y) { return !y.kernels || x.kernels->dense == y.kernels->dense; };
  STD_TORCH_CHECK(same(l.q, l.k) && same(l.q, l.v) && same(l.gate, l.up), "layer_new: float and quantized weights on one input");
}

int64_t layer_new(std::vector<Tensor> tiles, std::vector<int64_t> types, std::vector<int64_t> rows, std::vector<int64_t> columns, std::vector<Tensor> biases,
                  std::vector<Tensor> vectors, std::vector<int64_t> facts, double scale, double softcap, double eps) {
  STD_TORCH_CHECK(tiles.size() == kParts && types.size() == kParts && rows.size() == kParts && columns.size() == kParts && biases.size() == kParts &&
                      vectors.size() == kVectors && facts.size() == kFacts, "layer_new: lists of the wrong length");
  auto made = std::make_unique<OwnedLayer>();
  Layer& l = made->layer;
  l.attention = {int(facts[kHeads]), int(facts[kKvHeads]), int(facts[kKeyLength]), int(facts[kValueLength]), float(scale), float(softcap), int(facts[kWindow]), facts[kCausal] != 0};
  check_shape("layer_new", l.attention);
  Weight* parts[kParts] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
  for (int i = 0; i < kParts; i++) add_weight(*made, *parts[i], tiles[i], types[i], rows[i], columns[i], biases[i]);
  STD_TORCH_CHECK(l.q.kernels && l.o.kernels && l.gate.kernels && l.down.kernels, "layer_new: a weight is missing");
  made->length = l.q.k;
  check_widths(l, made->length);
  const int64_t lengths[kVectors] = {made->length, made->length, made->length, made->length, l.attention.key_length, l.attention.key_length, l.attention.heads};
  const float** places[kVectors] = {&l.attn_norm, &l.post_attn_norm, &l.ffn_norm, &l.post_ffn_norm, &l.q_norm, &l.k_norm, &l.sinks};
  for (int i = 0; i < kVectors; i++) {
    if (vectors[i].numel() == 0) continue;
    check_vector("layer_new", "vector", vectors[i], ScalarType::Float, lengths[i]);
    *places[i] = data<float>(vectors[i]);
    made->owned.push_back(vectors[i]);
  }
  STD_TORCH_CHECK(l.attn_norm && l.ffn_norm, "layer_new: a norm is missing");
  l.n_rot = int(facts[kRot]);
  l.rope_kind = int(facts[kRope]);
  l.rope_index = int(facts[kRopeIndex]);
  l.gate_kind = int(facts[kGateKind]);
  l.temper = facts[kTemper] != 0;
  l.eps = float(eps);
  STD_TORCH_CHECK(l.n_rot >= 0 && l.n_rot % 2 == 0 && l.n_rot <= l.attention.key_length, "layer_new: n_rot ", l.n_rot);
  STD_TORCH_CHECK(l.rope_kind >= kRopeNone && l.rope_kind <= kRopePairs, "layer_new: rope kind ", l.rope_kind);
  STD_TORCH_CHECK(l.rope_index >= 0, "layer_new: rope index ", l.rope_index);
  Registry& r = registry();
  std::lock_guard<std::mutex> hold(r.lock);
  r.layers[++r.last] = std::move(made);
  return r.last;
}

void layer_free(int64_t handle) {
  Registry& r = registry();
  std::lock_guard<std::mutex> hold(r.lock);
  r.layers.erase(handle);
}

Buffers make_buffers(const std::vector<const Layer*>& layers, int64_t tokens, int64_t length) {
  Buffers b{};
  int64_t acts = 0;
  const auto record = [](const Weight& w) { return w.kernels->dense ? w.k * 4 : w.k + w.k / 32 * 28; };
  for (const Layer* l : layers) {
    const AttentionShape& a = l->attention;
    b.ldqkv = std::max<int64_t>(b.ldqkv, int64_t(a.heads + a.kv_heads) * a.key_length + int64_t(a.kv_heads) * a.value_length);
    b.ldattn = std::max(b.ldattn, l->o.k);
    b.ldffn = std::max(b.ldffn, 2 * l->down.k);
    for (const Weight* w : {&l->q, &l->o, &l->gate, &l->down}) acts = std::max(acts, record(*w));
  }
  b.ldout = (length + 15) / 16 * 16;
  b.acts = Scratch::bytes(Scratch::kActs, tokens * acts);
  b.qkv = Scratch::floats(Scratch::kQkv, tokens * b.ldqkv);
  b.attn = Scratch::floats(Scratch::kAttn, tokens * b.ldattn);
  b.ffn = Scratch::floats(Scratch::kFfn, tokens * b.ldffn);
  b.out = Scratch::floats(Scratch::kOut, tokens * b.ldout);
  b.rows = Scratch::floats(Scratch::kRows, team::size() * length);
  return b;
}

// hidden (num_tokens, length) float32, updated in place; one key and value cache per layer
void decoder(std::vector<int64_t> handles, Tensor hidden, Tensor positions, std::vector<Tensor> slots, std::vector<Tensor> block_tables, Tensor query_start,
             Tensor seq_lens, std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<int64_t> groups, std::vector<Tensor> ropes,
             std::optional<Tensor> temperature) {
  const size_t count = handles.size();
  STD_TORCH_CHECK(count > 0 && keys.size() == count && values.size() == count && groups.size() == count, "decoder: layers, caches and groups differ in number");
  STD_TORCH_CHECK(!slots.empty() && slots.size() == block_tables.size(), "decoder: slots and block tables differ in number");
  std::vector<const Layer*> layers;
  int64_t length = 0;
  {
    Registry& r = registry();
    std::lock_guard<std::mutex> hold(r.lock);
    for (const int64_t handle : handles) {
      const auto found = r.layers.find(handle);
      STD_TORCH_CHECK(found != r.layers.end(), "decoder: no layer ", handle);
      STD_TORCH_CHECK(length == 0 || found->second->length == length, "decoder: layers of different lengths");
      length = found->second->length;
      layers.push_back(&found->second->layer);
    }
  }
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
  Buffers buffers = make_buffers(layers, n, length);
  buffers.next = next.data();
  DecoderRun run{layers.data(), caches.data(), int64_t(count), tokens.data(), &buffers, data<float>(hidden), length};
  team::run(team::size(), [](void* argument, int index, int threads) { kernels().decoder(*static_cast<DecoderRun*>(argument), index, threads); }, &run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("decoder", TORCH_BOX(&decoder));
}
STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) {
  m.impl("layer_new", TORCH_BOX(&layer_new));
  m.impl("layer_free", TORCH_BOX(&layer_free));
}

}  // namespace ollamapy
