// Bindings that make decoder layers: what is in one is checked here, once.
#include "layers.h"

#include <memory>
#include <mutex>
#include <unordered_map>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace ollamapy {
namespace {

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

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kRouter, kParts };
enum Vector { kAttnNorm, kPostAttnNorm, kFfnNorm, kPostFfnNorm, kQNorm, kKNorm, kSinks, kVectors };
enum Fact { kHeads, kKvHeads, kKeyLength, kValueLength, kWindow, kCausal, kRot, kRope, kRopeIndex, kGateKind, kTemper, kExperts, kUsed, kGating, kRenormalize, kPlanes, kFacts };
enum Number { kScale, kSoftcap, kEps, kExpertScale, kNumbers };

// Tiles (n / 16, bytes), or (experts, n / 16, bytes). The router's rows may end within a tile.
void add_weight(OwnedLayer& to, Weight& w, int part, const Tensor& tiles, int64_t type, int64_t n, int64_t k, const Tensor& bias) {
  if (tiles.numel() == 0) return;
  const int64_t experts = to.layer.routing.experts, dims = experts && part >= kGate && part <= kDown ? 3 : 2;
  w.kernels = kernels().matmul(type);
  STD_TORCH_CHECK(w.kernels, "layer_new: no kernel for tensor type ", type);
  STD_TORCH_CHECK(n > 0 && (n % 16 == 0 || part == kRouter) && k > 0 && k % w.kernels->block == 0 && k % 16 == 0, "layer_new: weight of shape (", n, ", ", k, ")");
  check_type("layer_new", "tiles", tiles, ScalarType::Byte, dims);
  const int64_t count = (n + 15) / 16, bytes = 16 * (k / w.kernels->block * w.kernels->block_bytes);
  STD_TORCH_CHECK(tiles.is_contiguous() && tiles.size(dims - 2) == count && tiles.size(dims - 1) == bytes && (dims == 2 || tiles.size(0) == experts),
                  "layer_new: tiles of another shape");
  w.tiles = data<uint8_t>(tiles);
  w.n = n;
  w.k = k;
  w.expert_bytes = dims == 3 ? count * bytes : 0;
  to.owned.push_back(tiles);
  if (bias.numel() == 0) return;
  check_vector("layer_new", "bias", bias, ScalarType::Float, n);
  STD_TORCH_CHECK(dims == 2, "layer_new: experts have no bias");
  w.bias = data<float>(bias);
  to.owned.push_back(bias);
}

Routing checked_routing(const std::vector<int64_t>& facts, double scale) {
  STD_TORCH_CHECK(facts[kExperts] >= 0 && facts[kExperts] <= kMaxExperts, "layer_new: ", facts[kExperts], " experts");
  const Routing r = {int(facts[kExperts]), int(facts[kUsed]), int(facts[kGating]), facts[kRenormalize] != 0, float(scale)};
  STD_TORCH_CHECK(r.experts == 0 ? r.used == 0 : r.used > 0 && r.used <= r.experts, "layer_new: ", r.used, " of ", r.experts, " experts");
  STD_TORCH_CHECK(r.gating >= kGatingSoftmax && r.gating <= kGatingSelected, "layer_new: gating ", r.gating);
  return r;
}

void check_router(const Layer& l, int64_t length) {
  const Routing& r = l.routing;
  STD_TORCH_CHECK(!r.experts == !l.router.kernels, "layer_new: experts and router come together");
  STD_TORCH_CHECK(!r.experts || (l.router.n == r.experts && l.router.k == length && l.up.kernels), "layer_new: router and experts do not fit");
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
                  std::vector<Tensor> vectors, std::vector<int64_t> facts, std::vector<double> numbers) {
  STD_TORCH_CHECK(tiles.size() == kParts && types.size() == kParts && rows.size() == kParts && columns.size() == kParts && biases.size() == kParts &&
                      vectors.size() == kVectors && facts.size() == kFacts && numbers.size() == kNumbers, "layer_new: lists of the wrong length");
  auto made = std::make_unique<OwnedLayer>();
  Layer& l = made->layer;
  l.attention = {int(facts[kHeads]), int(facts[kKvHeads]), int(facts[kKeyLength]), int(facts[kValueLength]), float(numbers[kScale]), float(numbers[kSoftcap]), int(facts[kWindow]), facts[kCausal] != 0};
  check_shape("layer_new", l.attention);
  l.routing = checked_routing(facts, numbers[kExpertScale]);
  l.planes = int(facts[kPlanes]);
  STD_TORCH_CHECK(l.planes >= 1 && l.planes <= kMaxPlanes, "layer_new: ", l.planes, " planes");
  Weight* parts[kParts] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.router};
  for (int i = 0; i < kParts; i++) add_weight(*made, *parts[i], i, tiles[i], types[i], rows[i], columns[i], biases[i]);
  STD_TORCH_CHECK(l.q.kernels && l.o.kernels && l.gate.kernels && l.down.kernels, "layer_new: a weight is missing");
  made->length = l.q.k;
  check_widths(l, made->length);
  check_router(l, made->length);
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
  l.eps = float(numbers[kEps]);
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

}  // namespace

void check_shape(const char* op, const AttentionShape& a) {
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, ": ", a.heads, " heads on ", a.kv_heads, " KV heads");
  const auto fits = [](int length) { return length >= 16 && length <= 256; };
  STD_TORCH_CHECK(fits(a.key_length) && fits(a.value_length), op, ": head lengths ", a.key_length, " and ", a.value_length, " are not between 16 and 256");
  STD_TORCH_CHECK(a.window >= 0, op, ": window ", a.window, " is negative");
}

std::vector<const Layer*> find_layers(const std::vector<int64_t>& handles, int64_t& length) {
  Registry& r = registry();
  std::lock_guard<std::mutex> hold(r.lock);
  std::vector<const Layer*> layers;
  for (const int64_t handle : handles) {
    const auto found = r.layers.find(handle);
    STD_TORCH_CHECK(found != r.layers.end(), "decoder: no layer ", handle);
    STD_TORCH_CHECK(layers.empty() || found->second->length == length, "decoder: layers of different lengths");
    length = found->second->length;
    layers.push_back(&found->second->layer);
  }
  return layers;
}

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) {
  m.impl("layer_new", TORCH_BOX(&layer_new));
  m.impl("layer_free", TORCH_BOX(&layer_free));
}

}  // namespace ollamapy
