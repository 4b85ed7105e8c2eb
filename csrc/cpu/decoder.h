// Plain structs that the bindings fill and the kernels of every instruction set read. No torch.
#pragma once
#include <cstdint>

namespace ollamapy {

// Matmul on packed weights of one GGUF tensor type: tiles of 16 rows that hold the bits of the file's rows, permuted, or rows of few
// values (isa/coded.h), which have another form than in the file.
struct MatmulKernels {
  // rows (n, k) as in the file -> tiles (ceil(n / 16), 16 * row bytes); tiles [begin, end). table: what the type is looked up in
  void (*pack)(const uint8_t* rows, int64_t n, int64_t k, const uint8_t* table, uint8_t* tiles, int64_t begin, int64_t end);
  void (*unpack_row)(const uint8_t* tiles, int64_t k, int64_t row, uint8_t* out);  // row `row` before it was permuted
  // y[i * ldy + 16 t + r] for the m rows of acts and tiles t of [begin, end); acts: records of `quantize_rows`, or float rows
  void (*matmul)(const uint8_t* tiles, int64_t k, const uint8_t* acts, int64_t m, float* y, int64_t ldy, int64_t begin, int64_t end);
  int64_t block, block_bytes;            // of rows in tiles
  int64_t file_block, file_block_bytes;  // of rows as in the file
  int64_t table_bytes;                   // 0: nothing is looked up
  bool dense;                            // float weights: acts are float rows
};

struct Weight {
  const MatmulKernels* kernels = nullptr;  // null: absent
  const uint8_t* tiles = nullptr;
  int64_t n = 0, k = 0;
  const float* bias = nullptr;  // (n,) or null
  int64_t expert_bytes = 0;     // from one expert's tiles to the next's; 0: not of experts
  __attribute__((always_inline)) int64_t tile_count() const { return (n + 15) / 16; }  // a copy of its own would be weak: see isa/
};

// Paged KV cache, blocks of 16 tokens: key (block, kv head, key_length, 16 tokens), value (block, kv head, 16 tokens,
// value_length). So 16 keys are the lanes of a score, and 16 components of a value the lanes of an output. In q8_0 each group of
// 32 components is a part of its own, (block, kv head, length / 32, kQ8GroupBytes): 512 quants in that order, and the half
// scales of the 16 tokens; 34 bytes per token and group, as in the file format's Q8_0.
enum CacheType : int { kCacheF16 = 0, kCacheBF16 = 1, kCacheF32 = 2, kCacheQ8_0 = 3 };
constexpr int64_t kQ8GroupBytes = 544;
struct Cache {
  uint8_t *keys, *values;
  int type;
};

enum RopeKind : int { kRopeNone = 0, kRopeHalves = 1, kRopePairs = 2 };
enum GateKind : int { kGateSilu = 0, kGateGeluTanh = 1 };

struct AttentionShape {
  int heads, kv_heads, key_length, value_length;  // lengths of 16 to 256
  float scale, softcap;  // softcap 0: off
  int window;            // 0: none
  bool causal;
};

enum Gating : int { kGatingSoftmax = 0, kGatingSigmoid = 1, kGatingSelected = 2 };  // selected: softmax of the chosen alone
constexpr int kMaxExperts = 4096;
struct Routing {
  int experts, used, gating;  // experts 0: a dense layer
  bool renormalize;
  float scale;  // of the chosen experts' weights
};

// A pre-norm decoder layer with gated feed-forward. Null vectors and absent weights are left out.
struct Layer {
  Weight q, k, v, o, gate, up, down;  // k and v absent: q has the rows of q, k and v; up absent: gate has those of gate and up
  Weight router;                      // of experts only; gate, up and down then are those of all experts
  Routing routing;
  int planes;  // int8 rows that make up one of x for quantized weights (isa/precise.h)
  const float *attn_norm, *post_attn_norm, *ffn_norm, *post_ffn_norm, *q_norm, *k_norm, *sinks;
  AttentionShape attention;
  int n_rot, rope_kind, rope_index, gate_kind;
  bool temper;  // queries are multiplied by Tokens.temperature
  float eps;
};

struct AttendItem {  // query rows [row0, row1) of a sequence
  int32_t seq, row0, row1;
  int64_t first;  // of its (row, chunk) pairs among those of all items
};
constexpr int kChunk = 256;           // keys of a softmax of its own
constexpr int kPartialExtra = 16;     // floats behind the values of a chunk: its largest score and its sum
constexpr int64_t kMostRowsApart = 4;  // query rows of an item whose chunks may be shared out

struct Tokens {  // the batch
  int64_t num_tokens, num_seqs, max_blocks;
  const int64_t *positions, *slots;
  const int32_t *block_table, *query_start, *seq_lens;
  const AttendItem* items;
  int64_t num_items, most_rows, most_chunks;  // rows of an item, and chunks of its keys
  int64_t pairs;                              // (row, chunk) pairs of all items
  const float* const* ropes;  // per rope_index: (positions, n_rot), n_rot / 2 cosines then as many sines
  const float* temperature;   // (num_tokens,) or null
};

// Into how many spans of chunks the keys of an item and KV head are cut, so that `threads` get even work. Those that a run then has
// may be fewer (team.h); the spans, and the room for their results, stay.
__attribute__((always_inline)) inline int attention_spans(const Tokens& t, int kv_heads, int threads) {
  const int64_t total = t.num_items * kv_heads;
  if (t.most_rows > kMostRowsApart || t.most_chunks < 2 || total >= 8 * int64_t(threads)) return 1;
  int64_t a = total, b = threads;  // to their greatest common divisor
  while (b) { const int64_t rest = a % b; a = b; b = rest; }
  return a ? int(threads / a) : 1;
}
// Floats for the results of chunks, 0 where none are shared out.
__attribute__((always_inline)) inline int64_t partial_floats(const Tokens& t, const AttentionShape& a, int threads) {
  return attention_spans(t, a.kv_heads, threads) == 1 ? 0 : t.pairs * a.heads * (a.value_length + kPartialExtra);
}

struct Job {  // one of several matmuls side by side: acts and y as in `MatmulKernels`, the planes of m rows one after the other
  const Weight* w;
  const uint8_t *tiles, *acts;
  float* y;
  int64_t m;
};

struct Entries {            // (token, place) pairs, sorted by expert
  int32_t* start;           // (experts + 1,): where an expert's entries begin
  int32_t *ids, *slot;      // (tokens, used): the expert of a token's place, and the entry
  int32_t *token, *expert;  // (entries,)
  float* weights;           // (tokens, used)
};

struct Buffers {  // rows of tokens, or of entries, times planes; row lengths in floats, multiples of 16
  uint8_t *acts, *gathered;
  float *qkv, *attn, *ffn, *out, *logits;
  int64_t ldqkv, ldattn, ldffn, ldout, ldlogits;
  float* partials; // attention's chunks where they are shared out: (pairs, heads, value_length + kPartialExtra)
  int threads;     // for so many they are
  float* rows;     // (threads, 2, ldrow): a row, and what rounding lost of one
  int64_t ldrow;
  Entries entries;
  Job* jobs;       // (2 * experts,)
  int64_t* next;   // (layers,) attention items handed out, zero at the start
};

struct AttentionRun {
  const AttentionShape* shape;
  const Tokens* tokens;
  const Cache* cache;
  const float *sinks, *q;  // (heads,) or null; (num_tokens, ldq)
  float* y;                // (num_tokens, ldy)
  int64_t ldq, ldy;
  float* partials;         // see Buffers
  int threads;
  int64_t* next;           // items handed out, zero at the start
};

struct DecoderRun {
  const Layer* const* layers;
  const Cache* caches;
  int64_t num_layers;
  const Tokens* const* tokens;  // per layer: its group's slots and block table
  const Buffers* buffers;
  float* hidden;  // (num_tokens, length), updated in place
  int64_t length;
};

}  // namespace ollamapy
