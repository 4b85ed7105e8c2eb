// What the files of this folder define, in the namespace of the instruction set they are compiled for.
#pragma once
#include <cstdint>

#include "../decoder.h"

#ifndef OLLAMAPY_ISA
#error "the files in isa/ are compiled with -DOLLAMAPY_ISA=<instruction set>"
#endif

namespace ollamapy::OLLAMAPY_ISA {

void embedding_rows(const uint8_t* data, int64_t row_stride, int64_t type, int64_t blocks, const int64_t* ids, int64_t begin,
                    int64_t end, float* out);

const MatmulKernels* matmul_kernels(int64_t type);
void norm_rows(const float* x, const float* w, float* y, int64_t n, float eps, int64_t begin, int64_t end);
void quantize_rows(const float* x, int64_t k, uint8_t* acts, int64_t rows, int planes, float* rest, int64_t begin, int64_t end);
void sum_planes(float* y, int64_t ldy, int64_t m, int planes, int64_t begin, int64_t end);
void run_decoder(const DecoderRun& run, int index, int count);
void run_attention(const AttentionRun& run, int index, int count);
void write_cache(const AttentionShape& a, const Cache& cache, const int64_t* slots, const float* k, const float* v, int64_t begin, int64_t end);
bool lane_maxima(const float* x, int64_t groups, float* out);
double exp_weights(const float* x, int64_t n, double best, double temperature, double* w);

}  // namespace ollamapy::OLLAMAPY_ISA
