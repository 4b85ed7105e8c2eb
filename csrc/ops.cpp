// The op table: every op's schema, with a line on what it does. Implementations register themselves beside their bindings
// (cpu/*.cpp). Built on the LibTorch stable ABI: one library serves torch 2.11 and later on any Python.
#include <torch/csrc/stable/library.h>

// Found by ollamapy/_build.py in the finished library: which sources it was built from.
extern "C" __attribute__((used, visibility("default"))) const char ollamapy_sources[] = "ollamapy-sources:" OLLAMAPY_SOURCES;

STABLE_TORCH_LIBRARY(ollamapy, m) {
  // The CPU instruction set whose kernels are in force: "base", "avx2", ... A non-empty `force` switches to that one first.
  m.def("cpu_isa(str force) -> str");
  // The instruction sets of this library that the CPU can run, best first, separated by blanks.
  m.def("cpu_isas() -> str");
  // (weights, bytes) of one block of a GGUF tensor type; (0, 0) for types that the kernels do not know.
  m.def("block_layout(int type) -> (int, int)");
  // data (V, row bytes) uint8 of GGUF type `type`; ids (n,) int32 or int64 -> rows ids of it as float32 (n, E).
  m.def("embedding_rows(Tensor data, int type, Tensor ids) -> Tensor");
  // The same out of tiles of `pack_weight`, of an (n, k) weight.
  m.def("embedding_tiles(Tensor tiles, int type, int n, int k, Tensor ids) -> Tensor");
  // Threads of the kernels below, the calling one included. At the start: 1.
  m.def("set_threads(int count) -> ()");
  // rows (n, row bytes) uint8 of GGUF type `type`, k weights each -> tiles (ceil(n / 16), 16 * row bytes): the same bits, permuted.
  // Those of experts, (X, n, row bytes), become (X, tiles, bytes). Types of few values (cpu/isa/coded.h) take other bytes in tiles than in
  // the file, and most of them a table, flat uint8 (ollamapy/quant/coded.py); `unpack_weight` gives their rows as the tiles hold them.
  m.def("pack_weight(Tensor rows, int type, int k, Tensor? table=None) -> Tensor");
  m.def("unpack_weight(Tensor tiles, int type, int n, int k) -> Tensor");
  // x (m, k) float32 times a packed (n, k) weight -> (m, n) float32. Quantized weights take x as int8 per 32.
  // As the sum of `planes` int8 rows, with 3 to the precision of float32.
  m.def("linear(Tensor x, Tensor tiles, int type, int n, Tensor? bias, int planes=1) -> Tensor");
  // x (rows, n) float32 / sqrt(mean of its squares + eps) * weight (n,) -> (rows, n)
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  // Paged KV caches are key (blocks, kv heads, key_length, 16) and value (blocks, kv heads, 16, value_length): float16, bfloat16 or
  // float32, blocks of 16 tokens; or q8_0 as uint8, both (blocks, kv heads, length / 32, 544): see cpu/decoder.h.
  // slots (tokens,) int64: block * 16 + offset.
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, Tensor slots) -> ()");
  // q (tokens, heads * key_length) float32; block_table (S, B), query_start (S + 1), seq_lens (S) int32 -> (tokens, heads * value_length).
  m.def("attention(Tensor q, Tensor key, Tensor value, Tensor block_table, Tensor query_start, Tensor seq_lens, int heads, float scale, "
        "float softcap, int window, bool causal, Tensor? sinks) -> Tensor");
  // A decoder layer for `decoder`. Lists in the order of csrc/cpu/layers.cpp's enums Part, Vector, Fact and Number; empty tensors are
  // absent. The tiles of experts are (experts, tiles, bytes).
  m.def("layer_new(Tensor[] tiles, int[] types, int[] rows, int[] columns, Tensor[] biases, Tensor[] vectors, int[] facts, float[] numbers) "
        "-> int");
  m.def("layer_free(int layer) -> ()");
  // hidden (tokens, length) float32 through the layers, in place. ropes: (positions, n_rot), cosines then sines. Layer i writes to
  // slots[groups[i]] and reads by block_tables[groups[i]].
  m.def("decoder(int[] layers, Tensor(a!) hidden, Tensor positions, Tensor[] slots, Tensor[] block_tables, Tensor query_start, "
        "Tensor seq_lens, Tensor[] keys, Tensor[] values, int[] groups, Tensor[] ropes, Tensor? temperature) -> ()");
  // logits (n, V) float32 -> the `count` largest of each row, larger first, lower id first among equals: float32 and int64, both
  // (n, min(count, V)). NaN for a row with a NaN or a positive infinity.
  m.def("largest(Tensor logits, int count) -> (Tensor, Tensor)");
  // log(sum(exp(row))) (n) float64; NaN for a row with a NaN or a positive infinity.
  m.def("log_totals(Tensor logits) -> Tensor");
  // Minus infinity in rows[i] of logits (n, V) float32 where bit v % 32 of word v / 32 of bits[i], int32, is 0.
  m.def("forbid(Tensor(a!) logits, Tensor rows, Tensor bits) -> ()");
  // One token of each row: cuts (n, 5) float64 are temperature, top_k, top_p, min_p and the number in [0, 1) that decides. Ids (n)
  // int64, -1 where a row is not finite, and their probabilities among the tokens kept (n) float64.
  m.def("draw(Tensor logits, Tensor cuts) -> (Tensor, Tensor)");
}
