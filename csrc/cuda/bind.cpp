// The CUDA ops: schemas, checks, and calls of the launchers. Built on the LibTorch stable ABI, as csrc/ops.cpp is, but into a
// library of its own. With OLLAMAPY_CUDA_ON_CPU it is the library of tests/cuda, whose kernels run on the CPU.
#ifndef OLLAMAPY_CUDA_ON_CPU
#define USE_CUDA 1
#endif
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#ifndef OLLAMAPY_CUDA_ON_CPU
#include <torch/csrc/stable/accelerator.h>
#endif

#include "../common/check.h"
#include "forms.h"

// Found by ollamapy/_build.py in the finished library: which sources it was built from.
extern "C" __attribute__((used, visibility("default"))) const char ollamapy_cuda_sources[] = "ollamapy-sources:" OLLAMAPY_SOURCES;

#ifdef OLLAMAPY_CUDA_ON_CPU
#define OLLAMAPY_KEY CPU
#else
#define OLLAMAPY_KEY CUDA
// Weak: the library loads beside a torch without CUDA, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace ollamapy::cuda {
namespace {

// The current stream of a tensor's device, with that device made current.
class Launch {
 public:
#ifdef OLLAMAPY_CUDA_ON_CPU
  explicit Launch(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) { TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_)); }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

void check_launch(const char* op, int code) { STD_TORCH_CHECK(code == 0, op, ": the launch failed with CUDA error ", code); }

template <class T>
T* data(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

Type type_of(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, ": ", name, " is not float32, float16 or bfloat16");
  return type == ScalarType::Float ? Type::kFloat : type == ScalarType::Half ? Type::kHalf : Type::kBfloat;
}

void check_place(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cpu() == like.is_cpu(), op, ": ", name, " is on another device");
}

void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name, " is not (", rows, ", ", columns, ")");
  check_contiguous_rows(op, name, t);
}

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t length) {
  check_type(op, name, t, type, 1);
  STD_TORCH_CHECK(t.size(0) == length && (length == 1 || t.stride(0) == 1), op, ": ", name, " is not a contiguous (", length, ")");
}

// q (groups, tokens, 32) uint8 and meta (groups, tokens, 2) int32.
void check_activations(const char* op, const Tensor& q, const Tensor& meta, int64_t tokens, int64_t groups) {
  check_type(op, "q", q, ScalarType::Byte, 3);
  check_type(op, "meta", meta, ScalarType::Int, 3);
  STD_TORCH_CHECK(q.is_contiguous() && q.size(0) == groups && q.size(1) == tokens && q.size(2) == 32, op, ": q is not a contiguous (", groups, ", ", tokens, ", 32)");
  STD_TORCH_CHECK(meta.is_contiguous() && meta.size(0) == groups && meta.size(1) == tokens && meta.size(2) == 2, op, ": meta is not a contiguous (", groups, ", ", tokens, ", 2)");
  check_place(op, "meta", meta, q);
}

Planes planes_of(const std::vector<Tensor>& planes, const Tensor& like) {
  STD_TORCH_CHECK(planes.size() == 5, "linear: a matrix has five planes, not ", planes.size());
  for (const Tensor& plane : planes) {
    if (!plane.numel()) continue;
    check_place("linear", "a plane", plane, like);
    STD_TORCH_CHECK(plane.is_contiguous(), "linear: a plane is not contiguous");
  }
  const auto at = [&](int i) { return data<const uint8_t>(planes[i]); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

// planes: those that the type lacks are empty; out (tokens, rows); bias (rows,) float32.
void linear(Tensor q, Tensor meta, std::vector<Tensor> planes, int64_t type, Tensor out, std::optional<Tensor> bias, bool add, int64_t path) {
  LinearArgs args = {};
  args.planes = planes_of(planes, q);
  STD_TORCH_CHECK(out.dim() == 2 && planes[0].size(0) == out.size(1), "linear: a matrix of ", planes[0].size(0), " rows for an out of another width");
  args.groups = int(q.size(0)), args.rows = int(out.size(1));
  args.x = {data<const uint8_t>(q), data<const Meta>(meta), int(out.size(0))};
  check_activations("linear", q, meta, args.x.tokens, args.groups);
  check_rows("linear", "out", out, args.x.tokens, args.rows);
  check_place("linear", "out", out, q);
  args.type = type_of("linear", "out", out);
  args.out = out.data_ptr(), args.stride = out.stride(0), args.add = add;
  if (bias) {
    check_vector("linear", "bias", *bias, ScalarType::Float, args.rows);
    check_place("linear", "bias", *bias, q);
    args.bias = data<const float>(*bias);
  }
  if (!args.x.tokens) return;
  const Launch launch(q);
  switch (type) {
#define OLLAMAPY_CASE(form, number) \
  case number: return check_launch("linear", ollamapy_linear_##form(&args, int(path), launch.stream()));
    OLLAMAPY_FORMS(OLLAMAPY_CASE)
#undef OLLAMAPY_CASE
  }
  STD_TORCH_CHECK(false, "linear: no kernel for tensor type ", type);
}

// x (tokens, width), or act(x) * up, to int8.
void quantize(Tensor x, std::optional<Tensor> up, bool gelu, Tensor q, Tensor meta) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 32 == 0, "quantize: x is not (tokens, a multiple of 32)");
  const int64_t tokens = x.size(0), width = x.size(1);
  check_rows("quantize", "x", x, tokens, width);
  check_activations("quantize", q, meta, tokens, width / 32);
  check_place("quantize", "q", q, x);
  GatedArgs args = {};
  args.type = type_of("quantize", "x", x), args.gate = x.data_ptr(), args.stride = x.stride(0);
  STD_TORCH_CHECK(args.type != Type::kFloat || (x.stride(0) % 4 == 0 && reinterpret_cast<uintptr_t>(args.gate) % 16 == 0), "quantize: rows of x are not aligned to 16 bytes");
  if (up) {
    check_rows("quantize", "up", *up, tokens, width);
    check_place("quantize", "up", *up, x);
    STD_TORCH_CHECK(up->scalar_type() == x.scalar_type() && (tokens <= 1 || up->stride(0) == x.stride(0)), "quantize: up has another dtype or stride than x");
    args.up = up->data_ptr();
    STD_TORCH_CHECK(args.type != Type::kFloat || reinterpret_cast<uintptr_t>(args.up) % 16 == 0, "quantize: rows of up are not aligned to 16 bytes");
  }
  args.q = data<uint8_t>(q), args.meta = data<Meta>(meta);
  args.tokens = int(tokens), args.width = int(width), args.gelu = gelu;
  if (!x.numel()) return;
  const Launch launch(x);
  check_launch("quantize", ollamapy_gated(&args, launch.stream()));
}

// x (tokens, width) float32 += delta, or += RMSNorm(delta) * post; with weight, RMSNorm(x) * weight to int8.
void norm(Tensor x, std::optional<Tensor> delta, std::optional<Tensor> post, std::optional<Tensor> weight, double eps, std::optional<Tensor> q, std::optional<Tensor> meta) {
  check_type("norm", "x", x, ScalarType::Float, 2);
  const int64_t tokens = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(x.is_contiguous() && width % 32 == 0, "norm: x is not a contiguous (tokens, a multiple of 32)");
  STD_TORCH_CHECK(!post || delta, "norm: post without delta");
  STD_TORCH_CHECK(bool(weight) == bool(q) && bool(q) == bool(meta), "norm: weight, q and meta go together");
  NormArgs args = {};
  if (weight) {
    check_vector("norm", "weight", *weight, ScalarType::Float, width);
    check_place("norm", "weight", *weight, x);
    args.weight = data<const float>(*weight);
  }
  if (post) {
    check_vector("norm", "post", *post, ScalarType::Float, width);
    check_place("norm", "post", *post, x);
    args.post = data<const float>(*post);
  }
  if (delta) {
    check_type("norm", "delta", *delta, ScalarType::Float, 2);
    check_place("norm", "delta", *delta, x);
    STD_TORCH_CHECK(delta->is_contiguous() && delta->size(0) == tokens && delta->size(1) == width, "norm: delta is not shaped as x");
    args.delta = data<const float>(*delta);
  }
  if (q) {
    check_activations("norm", *q, *meta, tokens, width / 32);
    check_place("norm", "q", *q, x);
    args.q = data<uint8_t>(*q), args.meta = data<Meta>(*meta);
  }
  args.x = data<float>(x), args.eps = float(eps);
  args.tokens = int(tokens), args.width = int(width);
  for (const void* p : {static_cast<const void*>(args.x), static_cast<const void*>(args.delta), static_cast<const void*>(args.post), static_cast<const void*>(args.weight)})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "norm: rows are not aligned to 16 bytes");
  if (!x.numel()) return;
  const Launch launch(x);
  check_launch("norm", ollamapy_norm(&args, launch.stream()));
}

// qkv (tokens, (heads + kv_heads) * length + kv_heads * value_length) float32 -> out (tokens, heads, length), key and value.
void rope(Tensor qkv, Tensor turns, Tensor positions, Tensor slots, std::vector<Tensor> vectors, bool interleaved, double eps, Tensor out, Tensor key, Tensor value) {
  check_type("rope", "qkv", qkv, ScalarType::Float, 2);
  check_type("rope", "turns", turns, ScalarType::Float, 2);
  STD_TORCH_CHECK(out.dim() == 3 && key.dim() == 4 && value.dim() == 4 && out.is_contiguous() && key.is_contiguous() && value.is_contiguous() && turns.is_contiguous(), "rope: out, key, value or turns has a wrong number of dimensions or is not contiguous");
  RopeArgs args = {};
  const int64_t tokens = qkv.size(0);
  args.tokens = int(tokens), args.heads = int(out.size(1)), args.length = int(out.size(2));
  args.kv_heads = int(key.size(1)), args.block = int(key.size(2)), args.value_length = int(value.size(3)), args.rot = int(turns.size(1));
  STD_TORCH_CHECK(out.size(0) == tokens && key.size(3) == args.length && value.size(1) == args.kv_heads && value.size(2) == args.block, "rope: out, key and value differ in shape");
  STD_TORCH_CHECK(args.length <= 256 && args.value_length <= 256 && args.rot <= args.length && args.rot % 2 == 0, "rope: heads of more than 256, or more turned than a head has");
  check_rows("rope", "qkv", qkv, tokens, int64_t(args.heads + args.kv_heads) * args.length + int64_t(args.kv_heads) * args.value_length);
  check_vector("rope", "positions", positions, ScalarType::Long, tokens);
  check_vector("rope", "slots", slots, ScalarType::Long, tokens);
  STD_TORCH_CHECK(vectors.size() == 3, "rope: vectors are q_norm, k_norm and temperature");
  const int64_t lengths[3] = {args.length, args.length, tokens};
  for (int i = 0; i < 3; i++)
    if (vectors[i].numel()) check_vector("rope", "a vector", vectors[i], ScalarType::Float, lengths[i]);
  args.q_norm = data<const float>(vectors[0]), args.k_norm = data<const float>(vectors[1]), args.temperature = data<const float>(vectors[2]);
  args.q = data<const float>(qkv), args.k = args.q + int64_t(args.heads) * args.length, args.v = args.k + int64_t(args.kv_heads) * args.length;
  args.q_stride = args.k_stride = args.v_stride = qkv.stride(0);
  args.turns = data<const float>(turns), args.positions = data<const int64_t>(positions), args.slots = data<const int64_t>(slots);
  args.out = out.data_ptr(), args.key = key.data_ptr(), args.value = value.data_ptr();
  args.out_type = type_of("rope", "out", out), args.cache_type = type_of("rope", "key", key);
  STD_TORCH_CHECK(key.scalar_type() == value.scalar_type(), "rope: key and value differ in dtype");
  args.interleaved = interleaved, args.eps = float(eps);
  if (!tokens) return;
  const Launch launch(qkv);
  check_launch("rope", ollamapy_rope(&args, launch.stream()));
}

std::string forms() {
  std::string names;
#define OLLAMAPY_LIST(form, number) names += (names.empty() ? "" : " ") + std::string(#form);
  OLLAMAPY_FORMS(OLLAMAPY_LIST)
#undef OLLAMAPY_LIST
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(ollamapy_cuda, m) {
  // The quantization types that `linear` takes, separated by blanks.
  m.def("forms() -> str");
  // Int8 activations (see csrc/cuda/args.h) times a matrix in planes, into or onto out. path: 0 matvec, 1 mma.
  m.def("linear(Tensor q, Tensor meta, Tensor[] planes, int type, Tensor(a!) out, Tensor? bias, bool add, int path) -> ()");
  // x, or act(x) * up, to int8 activations.
  m.def("quantize(Tensor x, Tensor? up, bool gelu, Tensor(a!) q, Tensor(b!) meta) -> ()");
  // x += delta, or its RMSNorm by post; RMSNorm of x by weight to int8.
  m.def("norm(Tensor(a!) x, Tensor? delta, Tensor? post, Tensor? weight, float eps, Tensor(b!)? q, Tensor(c!)? meta) -> ()");
  // Heads of qkv normed and turned; q to out, k and v to their slots. vectors: q_norm, k_norm, temperature; empty where absent.
  m.def("rope(Tensor qkv, Tensor turns, Tensor positions, Tensor slots, Tensor[] vectors, bool interleaved, float eps, Tensor(a!) out, "
        "Tensor(b!) key, Tensor(c!) value) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ollamapy_cuda, OLLAMAPY_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("rope", TORCH_BOX(&rope));
}
STABLE_TORCH_LIBRARY_IMPL(ollamapy_cuda, CompositeExplicitAutograd, m) { m.impl("forms", TORCH_BOX(&forms)); }

}  // namespace ollamapy::cuda
