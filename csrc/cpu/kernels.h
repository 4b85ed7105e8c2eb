// The registration table of CPU kernels: one function pointer per kernel, one table per instruction set.
// To add a kernel: a line here, its definition in isa/<family>.cpp, a line in isa/table.cpp, its binding in <family>.cpp and
// its schema in ../ops.cpp. The files in isa/ are compiled once per instruction set, with OLLAMAPY_ISA naming it; they
// include no torch header, and nothing in them may have external linkage except the table.
#pragma once
#include <cstdint>

#include "decoder.h"

namespace ollamapy {

struct Kernels {
  const char* isa;

  // Decodes row ids[i] of a matrix, `blocks` blocks of `type` from data + ids[i] * row_stride bytes, into out + i * width
  // floats, for i in [begin, end). The caller has checked type, ids and bounds.
  void (*embedding_rows)(const uint8_t* data, int64_t row_stride, int64_t type, int64_t blocks, const int64_t* ids, int64_t begin,
                         int64_t end, float* out);

  // The matmul kernels of a GGUF tensor type, null for a type that has none.
  const MatmulKernels* (*matmul)(int64_t type);

  // Rows [begin, end) of x (rows, k) as int8 records for the quantized matmuls (isa/quantize.h), in `planes` of them for each row
  // (isa/precise.h): plane p of row i is record p * rows + i. rest: (k,) scratch, or null for one plane.
  void (*quantize_rows)(const float* x, int64_t k, uint8_t* acts, int64_t rows, int planes, float* rest, int64_t begin, int64_t end);
  // Adds up the answers of those planes, (planes * m) rows, into the first m; columns [begin, end), multiples of 16.
  void (*add_planes)(float* y, int64_t ldy, int64_t m, int planes, int64_t begin, int64_t end);

  // y = x / rms(x) * w of rows [begin, end) of n floats.
  void (*norm_rows)(const float* x, const float* w, float* y, int64_t n, float eps, int64_t begin, int64_t end);

  // This thread's part of a run through decoder layers; all `count` threads of the team call it.
  void (*decoder)(const DecoderRun& run, int index, int count);

  // This thread's part of a batch's paged attention; all `count` threads of the team call it.
  void (*attention)(const AttentionRun& run, int index, int count);

  // Keys (n, kv_heads * key_length) and values of rows [begin, end) to their slots.
  void (*write_cache)(const AttentionShape& a, const Cache& cache, const int64_t* slots, const float* k, const float* v, int64_t begin, int64_t end);

  // For sampling: maxima of lanes of 16 logits, and weights exp((x - best) / temperature) with their sum (isa/sampling.cpp).
  bool (*lane_maxima)(const float* x, int64_t groups, float* out);
  double (*exp_weights)(const float* x, int64_t n, double best, double temperature, double* w);
};

const Kernels& kernels();  // of the instruction set in force: the best that the CPU has, unless `cpu_isa` forced another

}  // namespace ollamapy
