// Binding of the matmul to the precision of float32 on quantized weights (isa/precise.h). Checks, output, threads.
#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "layers.h"
#include "scratch.h"
#include "team.h"

namespace ollamapy {
namespace {

// x (m, k) float32, tiles of an (n, k) weight -> (m, n) float32
Tensor linear_precise(Tensor x, Tensor tiles, int64_t type, int64_t n, std::optional<Tensor> bias, int64_t planes) {
  const MatmulKernels* kernel = kernels().matmul(type);
  STD_TORCH_CHECK(kernel && !kernel->dense, "linear_precise: no kernel for tensor type ", type);
  STD_TORCH_CHECK(planes >= 1 && planes <= kMaxPlanes, "linear_precise: ", planes, " planes");
  check_type("linear_precise", "x", x, ScalarType::Float, 2);
  check_type("linear_precise", "tiles", tiles, ScalarType::Byte, 2);
  const int64_t m = x.size(0), k = x.size(1), count = (n + 15) / 16, ld = count * 16;
  STD_TORCH_CHECK(k > 0 && k % kernel->block == 0, "linear_precise: rows of ", k, " weights are not whole blocks of ", kernel->block);
  STD_TORCH_CHECK(x.is_contiguous() && tiles.is_contiguous(), "linear_precise: x and tiles must be contiguous");
  STD_TORCH_CHECK(n > 0 && tiles.size(0) == count && tiles.size(1) == 16 * (k / kernel->block * kernel->block_bytes),
                  "linear_precise: tiles are not those of a (", n, ", ", k, ") weight");
  if (bias) check_vector("linear_precise", "bias", *bias, ScalarType::Float, n);
  Tensor out = torch::stable::empty({m, n}, ScalarType::Float);
  if (m == 0) return out;
  const float *from = data<float>(x), *add = bias ? data<float>(*bias) : nullptr;
  uint8_t* acts = Scratch::bytes(Scratch::kActs, planes * m * (k + k / 32 * 28));
  float* rests = Scratch::floats(Scratch::kRows, team::size() * k);
  float *wide = Scratch::floats(Scratch::kOut, planes * m * ld), *y = data<float>(out);
  struct Call { const float* from; int64_t m, k; uint8_t* acts; int planes; float* rests; };
  Call call{from, m, k, acts, int(planes), rests};
  team::run(int(std::min<int64_t>(team::size(), m)), [](void* argument, int index, int threads) {
    const Call& c = *static_cast<Call*>(argument);
    kernels().quantize_planes(c.from, c.k, c.acts, c.m, c.planes, c.rests + index * c.k, c.m * index / threads, c.m * (index + 1) / threads);
  }, &call);
  const uint8_t* packed = data<uint8_t>(tiles);
  team::deal((count + 1) / 2, [&](int64_t begin, int64_t end) {
    const int64_t first = 2 * begin, last = std::min(2 * end, count), stop = std::min(16 * last, n);
    kernel->matmul(packed, k, acts, planes * m, wide, ld, first, last);
    kernels().add_planes(wide, ld, m, int(planes), 16 * first, 16 * last);
    for (int64_t i = 0; i < m; i++)
      for (int64_t c = 16 * first; c < stop; c++) y[i * n + c] = wide[i * ld + c] + (add ? add[c] : 0.0f);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) { m.impl("linear_precise", TORCH_BOX(&linear_precise)); }

}  // namespace ollamapy
