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
  return {pack_tiles<T>, unpack_row<T>, matmul_tiles<T>, T::kBlock, T::kBlockBytes, T::kBlock, T::kBlockBytes, 0, false};
}
template <class F>
constexpr MatmulKernels coded() {
  using T = typename F::Held;
  return {pack_coded<F>, unpack_coded<T>, matmul_tiles<T>, T::kBlock, T::kBlockBytes, F::kBlock, F::kBytes, F::kTableBytes, false};
}
template <class T>
constexpr MatmulKernels dense() {
  return {pack_dense<T>, unpack_dense<T>, dense_tiles<T>, 1, T::kBytes, 1, T::kBytes, 0, true};
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
    X(16, FileIQ2_XXS, coded) X(17, FileIQ2_XS, coded) X(22, FileIQ2_S, coded) X(18, FileIQ3_XXS, coded) X(21, FileIQ3_S, coded)
    X(19, FileIQ1_S, coded) X(29, FileIQ1_M, coded) X(34, FileTQ1_0, coded) X(35, FileTQ2_0, coded) X(40, FileNVFP4, coded)
    X(41, FileQ1_0, coded) X(42, FileQ2_0, coded)
#undef X
  }
  return nullptr;
}

}  // namespace ollamapy::OLLAMAPY_ISA
