// Argument checks of the bindings. A failed check becomes a Python RuntimeError that names the op and the argument.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace ollamapy {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t dims) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, " has ", t.dim(), " dimensions, not ", dims);
}

inline void check_vector(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t size) {
  check_type(op, name, t, type, 1);
  STD_TORCH_CHECK(t.size(0) == size && t.is_contiguous(), op, ": ", name, " is not a contiguous (", size, ")");
}

inline void check_contiguous_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, op, ": the rows of ", name, " are not contiguous");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace ollamapy
