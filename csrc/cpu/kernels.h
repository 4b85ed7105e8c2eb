// The registration table of CPU kernels: one function pointer per kernel, one table per instruction set.
// To add a kernel: a line here, its definition in isa/<family>.cpp, a line in isa/table.cpp, its binding in <family>.cpp and
// its schema in ../ops.cpp. The files in isa/ are compiled once per instruction set, with OLLAMAPY_ISA naming it; they
// include no torch header, and nothing in them may have external linkage except the table.
#pragma once
#include <cstdint>

namespace ollamapy {

struct Kernels {
  const char* isa;

  // Decodes row ids[i] of a matrix, `blocks` blocks of `type` from data + ids[i] * row_stride bytes, into out + i * width
  // floats, for i in [begin, end). The caller has checked type, ids and bounds.
  void (*embedding_rows)(const uint8_t* data, int64_t row_stride, int64_t type, int64_t blocks, const int64_t* ids, int64_t begin,
                         int64_t end, float* out);
};

namespace base { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#endif

const Kernels& kernels();  // of the instruction set in force: the best that the CPU has, unless `cpu_isa` forced another

}  // namespace ollamapy
