// This instruction set's table. Compiled once per instruction set.
#include "../kernels.h"
#include "families.h"

#define OLLAMAPY_TEXT_(x) #x
#define OLLAMAPY_TEXT(x) OLLAMAPY_TEXT_(x)

namespace ollamapy::OLLAMAPY_ISA {

const Kernels kernels = {
    .isa = OLLAMAPY_TEXT(OLLAMAPY_ISA),
    .embedding_rows = embedding_rows,
    .matmul = matmul_kernels,
    .quantize_rows = quantize_rows,
    .decoder = run_decoder,
    .attention = run_attention,
    .write_cache = write_cache,
};

}  // namespace ollamapy::OLLAMAPY_ISA
