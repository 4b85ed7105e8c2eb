// Bindings of embedding_rows and embedding_tiles: checks, output, threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/blocks.h"
#include "../common/check.h"
#include "kernels.h"
#include "team.h"

namespace ollamapy {
namespace {

constexpr int64_t kWeightsPerTask = 1 << 15;  // about 10 us of decoding: below that a second thread does not pay

std::vector<int64_t> checked_ids(const char* op, const Tensor& ids, int64_t num_rows) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, op, ": ids must be int32 or int64");
  STD_TORCH_CHECK(ids.dim() == 1, op, ": ids has ", ids.dim(), " dimensions, not 1");
  const int64_t count = ids.size(0), step = count > 1 ? ids.stride(0) : 1;
  std::vector<int64_t> result(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids.data_ptr())[i * step] : static_cast<const int32_t*>(ids.data_ptr())[i * step];
    STD_TORCH_CHECK(id >= 0 && id < num_rows, op, ": id ", id, " is not a row of ", num_rows);
    result[i] = id;
  }
  return result;
}

int64_t tasks(int64_t width) { return std::max<int64_t>(1, kWeightsPerTask / std::max<int64_t>(1, width)); }

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
  const std::vector<int64_t> rows = checked_ids("embedding_rows", ids, data.size(0));
  const int64_t blocks = data.size(1) / block.bytes, width = blocks * block.weights;
  Tensor out = torch::stable::empty({int64_t(rows.size()), width}, ScalarType::Float);
  float* values = static_cast<float*>(out.data_ptr());
  const Kernels& k = kernels();
  team::share(int64_t(rows.size()), tasks(width), [&](int64_t begin, int64_t end) {
    k.embedding_rows(bytes, stride, type, blocks, rows.data(), begin, end, values);
  });
  return out;
}

// The same rows out of a packed (n, k) weight: each is put together as the file had it, then decoded.
Tensor embedding_tiles(Tensor tiles, int64_t type, int64_t n, int64_t k, Tensor ids) {
  const MatmulKernels* m = kernels().matmul(type);
  STD_TORCH_CHECK(m && layout(type).weights, "embedding_tiles: no kernel for tensor type ", type);
  check_type("embedding_tiles", "tiles", tiles, ScalarType::Byte, 2);
  STD_TORCH_CHECK(k > 0 && k % m->block == 0, "embedding_tiles: rows of ", k, " weights are not whole blocks of ", m->block);
  const int64_t blocks = k / m->block, bytes = blocks * m->block_bytes;
  STD_TORCH_CHECK(tiles.is_contiguous() && tiles.size(0) == (n + 15) / 16 && tiles.size(1) == 16 * bytes, "embedding_tiles: tiles have another shape");
  const std::vector<int64_t> rows = checked_ids("embedding_tiles", ids, n);
  Tensor out = torch::stable::empty({int64_t(rows.size()), k}, ScalarType::Float);
  const uint8_t* from = static_cast<const uint8_t*>(tiles.data_ptr());
  float* values = static_cast<float*>(out.data_ptr());
  team::share(int64_t(rows.size()), tasks(4 * k), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(bytes);
    const int64_t first = 0;
    for (int64_t i = begin; i < end; ++i) {
      m->unpack_row(from, k, rows[i], row.data());
      kernels().embedding_rows(row.data(), bytes, type, blocks, &first, 0, 1, values + i * k);
    }
  });
  return out;
}

std::tuple<int64_t, int64_t> block_layout(int64_t type) {
  const Layout block = layout(type);
  return {block.weights, block.bytes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) {
  m.impl("embedding_rows", TORCH_BOX(&embedding_rows));
  m.impl("embedding_tiles", TORCH_BOX(&embedding_tiles));
}
STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) { m.impl("block_layout", TORCH_BOX(&block_layout)); }

}  // namespace ollamapy
