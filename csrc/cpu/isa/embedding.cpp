// Rows of a quantized matrix, decoded to float32. Compiled once per instruction set; the compiler vectorizes the decoders.
#include "../../common/dequant.h"
#include "families.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

template <class Block, int kWeights>
void decode_rows(const uint8_t* data, int64_t row_stride, int64_t blocks, const int64_t* ids, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    const Block* row = reinterpret_cast<const Block*>(data + ids[i] * row_stride);
    float* y = out + i * blocks * kWeights;
    for (int64_t b = 0; b < blocks; ++b) decode(row[b], y + b * kWeights);
  }
}

}  // namespace

void embedding_rows(const uint8_t* data, int64_t row_stride, int64_t type, int64_t blocks, const int64_t* ids, int64_t begin,
                    int64_t end, float* out) {
  switch (type) {
#define X(name, id, weights, Block) \
  case id: return decode_rows<Block, weights>(data, row_stride, blocks, ids, begin, end, out);
    OLLAMAPY_TYPES(X)
#undef X
  }
}

}  // namespace ollamapy::OLLAMAPY_ISA
