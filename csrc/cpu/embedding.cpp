// Binding of embedding_rows: checks, output, threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/blocks.h"
#include "../common/check.h"
#include "kernels.h"

namespace ollamapy {
namespace {

constexpr int64_t kWeightsPerTask = 1 << 15;  // about 10 us of decoding: below that a second thread does not pay

std::vector<int64_t> checked_ids(const Tensor& ids, int64_t num_rows) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, "embedding_rows: ids must be int32 or int64");
  STD_TORCH_CHECK(ids.dim() == 1, "embedding_rows: ids has ", ids.dim(), " dimensions, not 1");
  const int64_t count = ids.size(0), step = count > 1 ? ids.stride(0) : 1;
  std::vector<int64_t> result(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids.data_ptr())[i * step] : static_cast<const int32_t*>(ids.data_ptr())[i * step];
    STD_TORCH_CHECK(id >= 0 && id < num_rows, "embedding_rows: id ", id, " is not a row of ", num_rows);
    result[i] = id;
  }
  return result;
}

Tensor embedding_rows(Tensor data, int64_t type, Tensor ids) {
  const Layout block = layout(type);
  STD_TORCH_CHECK(block.weights, "embedding_rows: no decoder for tensor type ", type);
  check_type("embedding_rows", "data", data, ScalarType::Byte, 2);
  check_contiguous_rows("embedding_rows", "data", data);
  STD_TORCH_CHECK(data.size(1) % block.bytes == 0, "embedding_rows: rows of ", data.size(1), " bytes are not whole blocks of ", block.bytes);
  const uint8_t* bytes = static_cast<const uint8_t*>(data.data_ptr());
  const int64_t stride = data.stride(0);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(bytes) % block.alignment == 0 && stride % block.alignment == 0,
                  "embedding_rows: data is not aligned to ", block.alignment, " bytes");
  const std::vector<int64_t> rows = checked_ids(ids, data.size(0));
  const int64_t blocks = data.size(1) / block.bytes, width = blocks * block.weights;
  Tensor out = torch::stable::empty({int64_t(rows.size()), width}, ScalarType::Float);
  float* values = static_cast<float*>(out.data_ptr());
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, kWeightsPerTask / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows.size(), grain, [&](int64_t begin, int64_t end) {
    k.embedding_rows(bytes, stride, type, blocks, rows.data(), begin, end, values);
  });
  return out;
}

std::tuple<int64_t, int64_t> block_layout(int64_t type) {
  const Layout block = layout(type);
  return {block.weights, block.bytes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) { m.impl("embedding_rows", TORCH_BOX(&embedding_rows)); }
STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) { m.impl("block_layout", TORCH_BOX(&block_layout)); }

}  // namespace ollamapy
