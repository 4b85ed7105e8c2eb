// Rows of x to the precision of float32 on the integer kernels: each is the sum of several int8 rows ("planes"), the second
// holding what rounding lost in the first, and so on. A plane gains 8 bits: three leave an error of 2^-24 of a group's largest.
// The matmul takes the planes as so many rows more, and the sum of a row's answers has one order.
#pragma once
#include "quantize.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// Plane p of row i goes to record p * rows + i. rest: (k,) scratch, or null for one plane.
INLINE void quantize_planes(const float* x, int64_t k, uint8_t* acts, int64_t i, int64_t rows, int planes, float* rest) {
  for (int p = 0; p < planes; p++) {
    uint8_t* record = acts + (p * rows + i) * activation_bytes(k);
    const float* from = p ? rest : x;
    quantize_row(from, k, record);
    if (p + 1 == planes) return;
    const Activation a = activation(record, k);
    for (int64_t c = 0; c < k; c += 16) store(rest + c, fma(splat(-a.scale[c / 32]), load_s8(a.q + c), load(from + c)));
  }
}

// Columns [begin, end) of rows [0, m): the sum of the planes, rows m apart.
INLINE void add_planes(float* y, int64_t ldy, int64_t m, int planes, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t c = begin; c < end; c += 16) {
      F rest = load(y + ((planes - 1) * m + i) * ldy + c);
      for (int p = planes - 2; p >= 0; p--) rest = add(load(y + (p * m + i) * ldy + c), rest);
      store(y + i * ldy + c, rest);
    }
}

}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
