// Bindings of the matmul on packed weights: pack, unpack, linear. Checks, output, threads.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "layers.h"
#include "scratch.h"
#include "team.h"
#include "weights.h"

namespace ollamapy {
namespace {

const MatmulKernels& kernels_of(const char* op, int64_t type) {
  const MatmulKernels* found = kernels().matmul(type);
  STD_TORCH_CHECK(found, op, ": no kernel for tensor type ", type);
  return *found;
}

int64_t row_bytes(const char* op, int64_t block, int64_t block_bytes, int64_t k) {
  STD_TORCH_CHECK(k > 0 && k % block == 0, op, ": rows of ", k, " weights are not whole blocks of ", block);
  return k / block * block_bytes;
}
int64_t row_bytes(const char* op, const MatmulKernels& m, int64_t k) { return row_bytes(op, m.block, m.block_bytes, k); }

// Maps the pages of what is about to be read all at once: a fault for every 16 of a mapped file costs a tenth of packing them.
// Where that cannot be done the reads fault for themselves.
void map_pages(const uint8_t* data, int64_t size) {
#ifdef MADV_POPULATE_READ
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data) / page * page;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + uintptr_t(size) - begin, MADV_POPULATE_READ);
#endif
}

// Threads take turns of about a megabyte: a core may be another process's for a while.
Tensor pack_weight(Tensor rows, int64_t type, int64_t k, std::optional<Tensor> table) {
  const MatmulKernels& m = kernels_of("pack_weight", type);
  const int64_t dims = rows.dim() == 3 ? 3 : 2;
  check_type("pack_weight", "rows", rows, ScalarType::Byte, dims);
  STD_TORCH_CHECK(rows.is_contiguous(), "pack_weight: rows is not contiguous");
  const int64_t read = row_bytes("pack_weight", m.file_block, m.file_block_bytes, k), bytes = row_bytes("pack_weight", m, k);
  STD_TORCH_CHECK(rows.size(dims - 1) == read, "pack_weight: rows have ", rows.size(dims - 1), " bytes, not ", read);
  const int64_t experts = dims == 3 ? rows.size(0) : 1, n = rows.size(dims - 2), tiles = (n + 15) / 16;
  STD_TORCH_CHECK((table ? table->numel() : 0) == m.table_bytes, "pack_weight: a table of another size than ", m.table_bytes, " bytes");
  if (table) check_vector("pack_weight", "table", *table, ScalarType::Byte, m.table_bytes);
  const uint8_t* looked_up = table ? data<uint8_t>(*table) : nullptr;
  Tensor out = dims == 3 ? weight_memory({experts, tiles, 16 * bytes}) : weight_memory({tiles, 16 * bytes});
  const int64_t turn = std::max<int64_t>(1, (1 << 20) / (16 * bytes)), turns = (tiles + turn - 1) / turn;
  std::atomic<int64_t> next{0};
  team::share(experts * turns, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < experts * turns;) {
      const int64_t x = i / turns, begin = i % turns * turn, end = std::min(begin + turn, tiles);
      const uint8_t* from = data<uint8_t>(rows) + x * n * read;
      map_pages(from + 16 * begin * read, (std::min(16 * end, n) - 16 * begin) * read);
      m.pack(from, n, k, looked_up, data<uint8_t>(out) + x * tiles * 16 * bytes, begin, end);
    }
  });
  return out;
}

Tensor unpack_weight(Tensor tiles, int64_t type, int64_t n, int64_t k) {
  const MatmulKernels& m = kernels_of("unpack_weight", type);
  check_type("unpack_weight", "tiles", tiles, ScalarType::Byte, 2);
  const int64_t bytes = row_bytes("unpack_weight", m, k), count = (n + 15) / 16;
  STD_TORCH_CHECK(tiles.is_contiguous() && tiles.size(0) == count && tiles.size(1) == 16 * bytes, "unpack_weight: tiles have another shape");
  Tensor out = torch::stable::empty({n, bytes}, ScalarType::Byte);
  const uint8_t* from = static_cast<const uint8_t*>(tiles.data_ptr());
  uint8_t* to = static_cast<uint8_t*>(out.data_ptr());
  team::share(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) m.unpack_row(from, k, i, to + i * bytes);
  });
  return out;
}

// x (m, k) as the matmuls of quantized weights take it: each row in `planes` int8 records.
const uint8_t* int8_records(const float* x, int64_t m, int64_t k, int planes) {
  uint8_t* records = Scratch::bytes(Scratch::kActs, planes * m * (k + k / 32 * 28));
  team::share(m, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
    float* rest = planes > 1 ? Scratch::floats(Scratch::kRows, k) : nullptr;  // this thread's
    kernels().quantize_rows(x, k, records, m, planes, rest, begin, end);
  });
  return records;
}

// x (m, k) float32, tiles of an (n, k) weight -> (m, n) float32
Tensor linear(Tensor x, Tensor tiles, int64_t type, int64_t n, std::optional<Tensor> bias, int64_t planes) {
  const MatmulKernels& kernel = kernels_of("linear", type);
  STD_TORCH_CHECK(planes >= 1 && planes <= (kernel.dense ? 1 : kMaxPlanes), "linear: ", planes, " planes");
  check_type("linear", "x", x, ScalarType::Float, 2);
  check_type("linear", "tiles", tiles, ScalarType::Byte, 2);
  const int64_t m = x.size(0), k = x.size(1), bytes = row_bytes("linear", kernel, k), count = (n + 15) / 16, ld = count * 16;
  STD_TORCH_CHECK(x.is_contiguous() && tiles.is_contiguous(), "linear: x and tiles must be contiguous");
  STD_TORCH_CHECK(tiles.size(0) == count && tiles.size(1) == 16 * bytes, "linear: tiles are not those of a (", n, ", ", k, ") weight");
  if (bias) check_vector("linear", "bias", *bias, ScalarType::Float, n);
  Tensor out = torch::stable::empty({m, n}, ScalarType::Float);
  if (m == 0) return out;
  const bool in_place = n % 16 == 0 && planes == 1;  // tiles write 16 columns each, and planes rows of their own
  float *y = data<float>(out), *wide = in_place ? y : Scratch::floats(Scratch::kOut, planes * m * ld);
  const float* add = bias ? data<float>(*bias) : nullptr;
  const uint8_t* acts = kernel.dense ? data<uint8_t>(x) : int8_records(data<float>(x), m, k, int(planes));
  const uint8_t* packed = data<uint8_t>(tiles);
  team::deal((count + 1) / 2, [&](int64_t begin, int64_t end) {
    const int64_t first = 2 * begin, last = std::min(2 * end, count), stop = std::min(16 * last, n);
    kernel.matmul(packed, k, acts, planes * m, wide, ld, first, last);
    if (planes > 1) kernels().add_planes(wide, ld, m, int(planes), 16 * first, 16 * last);
    for (int64_t i = 0; i < m; i++) {
      float* row = wide + i * ld;
      if (add)
        for (int64_t c = 16 * first; c < stop; c++) row[c] += add[c];
      if (!in_place) std::copy(row + 16 * first, row + stop, y + i * n + 16 * first);
    }
  });
  return out;
}

void set_threads(int64_t count) {
  STD_TORCH_CHECK(count > 0 && count <= 256, "set_threads: ", count, " is not between 1 and 256");
  team::set_size(int(count));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
  m.impl("linear", TORCH_BOX(&linear));
}
STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) { m.impl("set_threads", TORCH_BOX(&set_threads)); }

}  // namespace ollamapy
