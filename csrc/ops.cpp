// The op table: every op's schema, with a line on what it does. Implementations register themselves beside their bindings
// (cpu/*.cpp). Built on the LibTorch stable ABI: one library serves torch 2.11 and later on any Python.
#include <torch/csrc/stable/library.h>

// Found by ollamapy/_build.py in the finished library: which sources it was built from.
extern "C" __attribute__((used, visibility("default"))) const char ollamapy_sources[] = "ollamapy-sources:" OLLAMAPY_SOURCES;

STABLE_TORCH_LIBRARY(ollamapy, m) {
  // The CPU instruction set whose kernels are in force: "base", "avx2", ... A non-empty `force` switches to that one first.
  m.def("cpu_isa(str force) -> str");
  // The instruction sets that this CPU can run, best first, separated by blanks.
  m.def("cpu_isas() -> str");
  // (weights, bytes) of one block of a GGUF tensor type; (0, 0) for types that the kernels do not know.
  m.def("block_layout(int type) -> (int, int)");
  // data (V, row bytes) uint8 of GGUF type `type`; ids (n,) int32 or int64 -> rows ids of it as float32 (n, E).
  m.def("embedding_rows(Tensor data, int type, Tensor ids) -> Tensor");
}
