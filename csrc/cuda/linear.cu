// y = W x on packed weights, compiled once for each quantization type: OLLAMAPY_FORM is one of forms.cuh.
#include "matvec.cuh"
#include "mma.cuh"

namespace ollamapy::cuda {
namespace {

int blocks(const LinearArgs& args, int rows_of_block) { return (args.rows + rows_of_block - 1) / rows_of_block; }

// Bytes in flight are what counts for few tokens, and reuse of the activations for more.
template <class F, int TOKENS>
void matvec(const LinearArgs& args, void* stream) {
  // Two rows of W share the activations that four tokens load; with eight tokens their sums would not fit the registers.
  constexpr int kRows = TOKENS == 4 ? 2 : 1, kUnroll = F::kLow == 8 || TOKENS >= 4 ? 1 : F::kLow == 4 || TOKENS > 1 ? 2 : 4;
  const auto kernel = matvec_kernel<F, TOKENS, kRows, kUnroll>;
  CUDA_LAUNCH(kernel, blocks(args, kRowLanes * kRows), kMatvecThreads, 0, stream, args);
}

template <class F, int TILES, int COLUMNS>
void mma(const LinearArgs& args, void* stream) {
  using S = MmaShape<F, TILES, COLUMNS>;
  static_assert(S::kShared <= 99 * 1024, "more shared memory than sm_89 and sm_120 have");
  const auto kernel = mma_kernel<F, TILES, COLUMNS>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  const dim3 grid(blocks(args, S::kRows), (args.x.tokens + S::kTokens - 1) / S::kTokens);
  CUDA_LAUNCH(kernel, grid, kMmaThreads, S::kShared, stream, args);
}

template <class F>
int launch(const LinearArgs& args, Path path, void* stream) {
  const int tokens = args.x.tokens;
  if (path == Path::kMatvec) {
    if (tokens == 1) matvec<F, 1>(args, stream);
    else if (tokens == 2) matvec<F, 2>(args, stream);
    else if (tokens <= 4) matvec<F, 4>(args, stream);
    else if (tokens <= 8) matvec<F, 8>(args, stream);
    else return cudaErrorInvalidValue;
  } else {
    if (tokens <= 8) mma<F, 2, 1>(args, stream);
    else if (tokens <= 16) mma<F, 2, 2>(args, stream);
    else if (tokens <= 32) mma<F, 2, 4>(args, stream);
    else mma<F, 2, 8>(args, stream);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace ollamapy::cuda

#define OLLAMAPY_JOIN(a, b) a##b
#define OLLAMAPY_NAME(form) OLLAMAPY_JOIN(ollamapy_linear_, form)

// 0, or a CUDA error code.
extern "C" int OLLAMAPY_NAME(OLLAMAPY_FORM)(const ollamapy::cuda::LinearArgs* args, int path, void* stream) {
  return ollamapy::cuda::launch<ollamapy::cuda::OLLAMAPY_FORM>(*args, ollamapy::cuda::Path(path), stream);
}
