// The table of matmul kernels by GGUF tensor type. Compiled once per instruction set.
#include "../decoder.h"
#include "families.h"

#include "coded.h"
#include "dense.h"
#include "matmul.h"
#include "pack.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

template <class T>
constexpr MatmulKernels quantized() {
  return {pack_tiles<T>, unpack_row<T>, matmul_tiles<T>, T::kBlock, T::kBlockBytes, false};
}
template <class T>
constexpr MatmulKernels coded() {
  return {pack_coded<T>, unpack_coded<T>, matmul_tiles<T>, T::kBlock, T::kBlockBytes, false};
}
template <class T>
constexpr MatmulKernels dense() {
  return {pack_dense<T>, unpack_dense<T>, dense_tiles<T>, 1, T::kBytes, true};
}

}  // namespace

const MatmulKernels* matmul_kernels(int64_t type) {
  switch (type) {
#define X(id, T, make)                              \
  case id: {                                        \
    static constexpr MatmulKernels table = make<T>(); \
    return &table;                                  \
  }
    X(0, DenseF32, dense) X(1, DenseF16, dense) X(30, DenseBF16, dense)
    X(2, Q4_0, quantized) X(3, Q4_1, quantized) X(6, Q5_0, quantized) X(7, Q5_1, quantized) X(8, Q8_0, quantized)
    X(10, Q2_K, quantized) X(11, Q3_K, quantized) X(12, Q4_K, quantized) X(13, Q5_K, quantized) X(14, Q6_K, quantized)
    X(20, IQ4_NL, quantized) X(23, IQ4_XS, quantized) X(39, MXFP4, quantized)
    X(16, IQ2Per32, coded) X(17, IQ2Per16, coded) X(22, IQ2Per16, coded) X(18, IQ3Per32, coded) X(21, OddPer32, coded)
    X(19, OddPer32, coded) X(29, OddPer16, coded) X(34, FP4Per32, coded) X(35, FP4Per32, coded) X(40, FP4Per16, coded)
    X(41, OddPer32, coded) X(42, FP4Per32, coded)
#undef X
  }
  return nullptr;
}

}  // namespace ollamapy::OLLAMAPY_ISA
