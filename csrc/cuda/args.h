// What the launchers take: plain structs and raw pointers, for the kernels and for their bindings. Knows no torch and no CUDA.
#pragma once
#include <cstdint>

namespace ollamapy::cuda {

// A matrix (rows, 32 * groups) in the planes of triton_kernels/layout.py; planes that its type lacks are null.
struct Planes {
  const uint8_t* low;
  const uint8_t* high;
  const uint8_t* scales;
  const uint8_t* d;
  const uint8_t* m;
};

enum class Type : int { kFloat = 0, kHalf = 1, kBfloat = 2 };

// Activations as int8: q (groups, tokens, 32) with the words of a group in the order 0 4 1 5 2 6 3 7 (word: four consecutive k), so
// that the two words that a thread of an mma wants are neighbours; meta (groups, tokens): scale, and the sums of both halves.
struct Meta {
  float scale;
  uint32_t sums;  // two int16
};
struct Activations {
  const uint8_t* q;
  const Meta* meta;
  int tokens;
};

// A matrix, the activations, and where their products go.
struct LinearArgs {
  Planes planes;
  Activations x;
  const float* bias;  // (rows,) or null
  void* out;          // (tokens, rows) of `type`, `stride` elements from one token to the next
  int64_t stride;
  int rows, groups;
  int add;  // products are added to what `out` holds
  Type type;
};

enum class Path : int { kMatvec = 0, kMma = 1 };

struct NormArgs {
  float* x;            // (tokens, width), contiguous
  const float* delta;  // added to x first, in place; or null
  const float* post;   // delta is normed by it before; or null
  const float* weight;  // null: the sum alone is wanted
  uint8_t* q;           // the normed values as int8
  Meta* meta;
  int tokens, width;
  float eps;
};

struct GatedArgs {
  const void* gate;  // (tokens, width) of `type`, rows `stride` apart
  const void* up;    // null: the rows of gate are quantized as they are
  uint8_t* q;
  Meta* meta;
  int64_t stride;
  int tokens, width;
  int gelu;
  Type type;
};

// Heads of q, k and v, rows `stride` apart, are normed where a weight is given, turned, and written: q to `out` (tokens, heads,
// length), k and v to the cache (blocks, kv_heads, block, length).
struct RopeArgs {
  const float* q;
  const float* k;
  const float* v;
  const float* q_norm;  // (length,) or null
  const float* k_norm;
  const float* turns;  // (positions, rot): cosines of the pairs, then their sines
  const int64_t* positions;
  const int64_t* slots;       // (tokens,); below zero: nobody's, k and v are not written
  const float* temperature;   // (tokens,) on q, or null
  void* out;
  void* key;
  void* value;
  int64_t q_stride, k_stride, v_stride;
  int tokens, heads, kv_heads, length, value_length, rot, interleaved, block;
  Type out_type, cache_type;
  float eps;
};

}  // namespace ollamapy::cuda
