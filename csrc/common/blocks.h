// The bytes of every GGUF tensor type that kernels read: one struct per block, its size proven, shared by CPU and CUDA.
// Knows no arithmetic (that is dequant.h) and no torch. Layouts: ggml's ggml-common.h; ids: ggml.h.
// Half-precision fields are the raw bits of an IEEE float16.
#pragma once
#include <cstdint>

namespace ollamapy {

using half_bits = uint16_t;
using bfloat_bits = uint16_t;

struct BlockF32 { float d; };
struct BlockF16 { half_bits d; };
struct BlockBF16 { bfloat_bits d; };

struct BlockQ4_0 { half_bits d; uint8_t qs[16]; };                       // low nibbles: weights 0-15, high: 16-31; (q - 8) d
struct BlockQ4_1 { half_bits d, m; uint8_t qs[16]; };                    // q d + m
struct BlockQ5_0 { half_bits d; uint8_t qh[4], qs[16]; };                // fifth bits in qh; (q - 16) d
struct BlockQ5_1 { half_bits d, m; uint8_t qh[4], qs[16]; };
struct BlockQ8_0 { half_bits d; int8_t qs[32]; };
struct BlockIQ4_NL { half_bits d; uint8_t qs[16]; };                     // nibbles index a table of 16
struct BlockMXFP4 { uint8_t e, qs[16]; };                                // e8m0 scale, e2m1 weights

struct BlockQ2_K { uint8_t scales[16], qs[64]; half_bits d, dmin; };     // per 16: scale low nibble, min high nibble
struct BlockQ3_K { uint8_t hmask[32], qs[64], scales[12]; half_bits d; };
struct BlockQ4_K { half_bits d, dmin; uint8_t scales[12], qs[128]; };    // per 32: 6-bit scale and min
struct BlockQ5_K { half_bits d, dmin; uint8_t scales[12], qh[32], qs[128]; };
struct BlockQ6_K { uint8_t ql[128], qh[64]; int8_t scales[16]; half_bits d; };
struct BlockIQ4_XS { half_bits d; uint16_t scales_h; uint8_t scales_l[4], qs[128]; };

// GGUF's ids, with the block that stands for each: the list that dispatch is made from.
#define OLLAMAPY_TYPES(X)      \
  X(F32, 0, 1, BlockF32)       \
  X(F16, 1, 1, BlockF16)       \
  X(Q4_0, 2, 32, BlockQ4_0)    \
  X(Q4_1, 3, 32, BlockQ4_1)    \
  X(Q5_0, 6, 32, BlockQ5_0)    \
  X(Q5_1, 7, 32, BlockQ5_1)    \
  X(Q8_0, 8, 32, BlockQ8_0)    \
  X(Q2_K, 10, 256, BlockQ2_K)  \
  X(Q3_K, 11, 256, BlockQ3_K)  \
  X(Q4_K, 12, 256, BlockQ4_K)  \
  X(Q5_K, 13, 256, BlockQ5_K)  \
  X(Q6_K, 14, 256, BlockQ6_K)  \
  X(IQ4_NL, 20, 32, BlockIQ4_NL) \
  X(IQ4_XS, 23, 256, BlockIQ4_XS) \
  X(BF16, 30, 1, BlockBF16)    \
  X(MXFP4, 39, 32, BlockMXFP4)

struct Layout {
  int64_t weights, bytes, alignment;  // of one block; weights 0: a type that kernels do not know
};

inline constexpr Layout layout(int64_t type) {
  switch (type) {
#define X(name, id, weights, Block) \
  case id: return {weights, sizeof(Block), alignof(Block)};
    OLLAMAPY_TYPES(X)
#undef X
    default: return {0, 0, 1};
  }
}

static_assert(sizeof(BlockF32) == 4 && sizeof(BlockF16) == 2 && sizeof(BlockBF16) == 2);
static_assert(sizeof(BlockQ4_0) == 18);
static_assert(sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockIQ4_NL) == 18);
static_assert(sizeof(BlockMXFP4) == 17);
static_assert(sizeof(BlockQ2_K) == 84);
static_assert(sizeof(BlockQ3_K) == 110);
static_assert(sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176);
static_assert(sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ4_XS) == 136);

}  // namespace ollamapy
