// This instruction set's table. Compiled once per instruction set; of a set that gains nothing over another, only this file is,
// with OLLAMAPY_ISA naming the other, whose kernels the table OLLAMAPY_TABLE lists.
#include "../kernels.h"
#include "families.h"

#define OLLAMAPY_TEXT_(x) #x
#define OLLAMAPY_TEXT(x) OLLAMAPY_TEXT_(x)

namespace ollamapy::OLLAMAPY_TABLE {

using namespace ollamapy::OLLAMAPY_ISA;

extern const Kernels kernels;
const Kernels kernels = {
    .isa = OLLAMAPY_TEXT(OLLAMAPY_TABLE),
    .embedding_rows = embedding_rows,
    .matmul = matmul_kernels,
    .quantize_rows = quantize_rows,
    .add_planes = sum_planes,
    .norm_rows = norm_rows,
    .decoder = run_decoder,
    .attention = run_attention,
    .write_cache = write_cache,
    .lane_maxima = lane_maxima,
    .exp_weights = exp_weights,
};

}  // namespace ollamapy::OLLAMAPY_TABLE
