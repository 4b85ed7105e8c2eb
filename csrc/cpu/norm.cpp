// Binding of rms_norm: checks, output, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "kernels.h"
#include "team.h"

namespace ollamapy {
namespace {

// x (rows, n) float32, weight (n,) -> (rows, n)
Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check_type("rms_norm", "x", x, ScalarType::Float, 2);
  check_type("rms_norm", "weight", weight, ScalarType::Float, 1);
  const int64_t rows = x.size(0), n = x.size(1);
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "rms_norm: x and weight must be contiguous");
  STD_TORCH_CHECK(weight.size(0) == n, "rms_norm: weight has ", weight.size(0), " elements, not ", n);
  Tensor out = torch::stable::empty({rows, n}, ScalarType::Float);
  const float *from = static_cast<const float*>(x.data_ptr()), *w = static_cast<const float*>(weight.data_ptr());
  float* y = static_cast<float*>(out.data_ptr());
  team::share(rows, 64, [&](int64_t begin, int64_t end) { kernels().norm_rows(from, w, y, n, float(eps), begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace ollamapy
