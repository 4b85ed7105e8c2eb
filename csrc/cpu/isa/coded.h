// Types whose weights are each one of 16 values times a scale of 16 or 32 k: the codebook types (IQ1 to IQ3), ternary ones, NVFP4.
//
// Their rows come with the codebooks looked up: a block is the float32 scale of 32 k, or two of 16, then 16 bytes, byte j with the
// numbers of values j and j + 16 in its nibbles. So they take 5 or 6 bits a weight, where the file's 1.5 to 4.5 cannot be read
// at the speed of memory.
#pragma once
#include "tile.h"
#include "transpose.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// Plus 64. The odd ones also hold 8 (x +- 1/8) of x = -1, 0, 1.
alignas(16) constexpr uint8_t kValuesOdd[16] = {49, 51, 53, 55, 57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79};
alignas(16) constexpr uint8_t kValuesFP4[16] = {64, 65, 66, 67, 68, 70, 72, 76, 64, 63, 62, 61, 60, 58, 56, 52};
alignas(16) constexpr uint8_t kValuesIQ2[16] = {72, 89, 107, 56, 39, 21, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64};
alignas(16) constexpr uint8_t kValuesIQ3[16] = {68, 76, 84, 92, 100, 108, 116, 126, 60, 52, 44, 36, 28, 20, 12, 2};

template <const uint8_t* values, bool per16>
struct Coded : Looked<values, false, Layout<4, 0, 6, false, per16, 32, per16 ? 24 : 20>> {
  static constexpr bool kFloatScales = true;
};
using OddPer16 = Coded<kValuesOdd, true>;    // IQ1_M
using OddPer32 = Coded<kValuesOdd, false>;   // IQ1_S, IQ3_S, Q1_0
using FP4Per16 = Coded<kValuesFP4, true>;    // NVFP4
using FP4Per32 = Coded<kValuesFP4, false>;   // TQ1_0, TQ2_0, Q2_0
using IQ2Per16 = Coded<kValuesIQ2, true>;    // IQ2_XS, IQ2_S
using IQ2Per32 = Coded<kValuesIQ2, false>;   // IQ2_XXS
using IQ3Per32 = Coded<kValuesIQ3, false>;   // IQ3_XXS

// A block of row r <-> its lanes in a tile.
template <class T, bool unpack>
INLINE void move_block(std::conditional_t<unpack, uint8_t, const uint8_t>* block, std::conditional_t<unpack, const uint8_t, uint8_t>* scales,
                       std::conditional_t<unpack, const uint8_t, uint8_t>* quants, int64_t r) {
  const auto move = [](auto* row, auto* lane) {
    if constexpr (unpack) memcpy(row, lane, 4);
    else memcpy(lane, row, 4);
  };
  for (int h = 0; h < T::kScaleBytes / 4; h++) move(block + 4 * h, scales + 64 * h + 4 * r);
  for (int v = 0; v < 4; v++) move(block + T::kScaleBytes + 4 * v, quants + 64 * v + 4 * r);
}

template <class T>
void pack_coded(const uint8_t* rows, int64_t n, int64_t k, uint8_t* tiles, int64_t tile_begin, int64_t tile_end) {
  const int64_t groups = k / 32, row_bytes = groups * T::kBlockBytes;
  for (int64_t t = tile_begin; t < tile_end; t++) {
    uint8_t* tile = tiles + t * 16 * row_bytes;
    if ((t + 1) * 16 <= n) {
      for (int64_t g = 0; g < groups; g++) {
        const Chunk<T> chunk = chunk_of<T>(tile, g, groups);
        const int at = int(g % kChunkGroups);
        const uint8_t* block = rows + t * 16 * row_bytes + g * T::kBlockBytes;
        B q[4];
        load_quads(block, row_bytes, q);
        for (int h = 0; h < T::kScaleBytes / 4; h++) store_bytes(const_cast<uint8_t*>(chunk.record(at)) + 64 * h, q[h]);
        load_quads(block + T::kScaleBytes, row_bytes, q);
        for (int v = 0; v < 4; v++) store_bytes(const_cast<uint8_t*>(chunk.group(at)) + 64 * v, q[v]);
      }
      continue;
    }
    memset(tile, 0, size_t(16 * row_bytes));
    for (int64_t r = 0; r < 16 && t * 16 + r < n; r++)
      for (int64_t g = 0; g < groups; g++) {
        const Chunk<T> chunk = chunk_of<T>(tile, g, groups);
        const int at = int(g % kChunkGroups);
        move_block<T, false>(rows + (t * 16 + r) * row_bytes + g * T::kBlockBytes, const_cast<uint8_t*>(chunk.record(at)),
                             const_cast<uint8_t*>(chunk.group(at)), r);
      }
  }
}
template <class T>
void unpack_coded(const uint8_t* tiles, int64_t k, int64_t row, uint8_t* out) {
  const int64_t groups = k / 32, row_bytes = groups * T::kBlockBytes;
  for (int64_t g = 0; g < groups; g++) {
    const Chunk<T> chunk = chunk_of<T>(tiles + row / 16 * 16 * row_bytes, g, groups);
    const int at = int(g % kChunkGroups);
    move_block<T, true>(out + g * T::kBlockBytes, chunk.record(at), chunk.group(at), row % 16);
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
