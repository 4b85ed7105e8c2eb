// What the files of this folder define, in the namespace of the instruction set they are compiled for.
#pragma once
#include <cstdint>

#ifndef OLLAMAPY_ISA
#error "the files in isa/ are compiled with -DOLLAMAPY_ISA=<instruction set>"
#endif

namespace ollamapy::OLLAMAPY_ISA {

void embedding_rows(const uint8_t* data, int64_t row_stride, int64_t type, int64_t blocks, const int64_t* ids, int64_t begin,
                    int64_t end, float* out);

}  // namespace ollamapy::OLLAMAPY_ISA
