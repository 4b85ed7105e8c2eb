// The packed weight layout and how each GGUF type is read from it.
//
// Rows are grouped in tiles of 16; a tile holds exactly the bits of its 16 rows (16 * row_bytes bytes), permuted. It goes
// along k in chunks of 256 (the last may be shorter), so that a matmul reads memory in one line from end to end. A chunk:
//   scales  per block of the type: its scale bytes, byte i of the 16 rows side by side; 16-bit fields as 16 halves
//   quants  per group of 32 k: 64-byte vectors, each 4 consecutive k ("quad") of 16 rows
//              4-bit part   4 vectors; vector v: low nibbles = quad v, high nibbles = quad v + 4
//              2-bit part   2 vectors; vector v: bits 2j of quad 4v + j
//              1-bit part   1 vector;  bit q of each byte = quad q
//              8-bit part   8 vectors, sign bit flipped (so that it is unsigned)
// N is padded to a multiple of 16 with zero bits (zero scales: the rows add nothing).
#pragma once
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

constexpr int kChunkGroups = 8;  // groups of 32 k

struct GroupScales {  // of one group of 32 k: value = scale * (unsigned quant - zero) + min
  F scale[2];         // [1] only if halves
  F min[2];
};


// bits: width of the quant; zero_log2: log2 of the offset (-1: none); halves: scales per 16 k; block: k per scale record
template <int base_bits, int extra_bits, int zero, bool has_min, bool per16, int block, int block_bytes>
struct Layout {
  static constexpr int kBase = base_bits, kExtra = extra_bits, kZeroLog2 = zero, kBlock = block, kBlockBytes = block_bytes;
  static constexpr bool kMin = has_min, kHalves = per16;
  static constexpr int kGroupVectors = base_bits + extra_bits;               // 64-byte vectors per group of quants
  static constexpr int kScaleBytes = block_bytes - block * (base_bits + extra_bits) / 8;  // per row and block
  static constexpr int kBlockGroups = block / 32, kGroupBytes = 64 * kGroupVectors;
  static constexpr int kChunkBytes = kChunkGroups / kBlockGroups * 16 * block_bytes;      // of a whole chunk
  static constexpr bool kWide = base_bits == 8;
  static constexpr bool kTable = false, kFloatScales = false;
};
struct Q4_0 : Layout<4, 0, 3, false, false, 32, 18> {};
struct Q4_1 : Layout<4, 0, -1, true, false, 32, 20> {};
struct Q5_0 : Layout<4, 1, 4, false, false, 32, 22> {};
struct Q5_1 : Layout<4, 1, -1, true, false, 32, 24> {};
struct Q8_0 : Layout<8, 0, 7, false, false, 32, 34> {};
struct Q2_K : Layout<2, 0, -1, true, true, 256, 84> {};
struct Q3_K : Layout<2, 1, 2, false, true, 256, 110> {};
struct Q4_K : Layout<4, 0, -1, true, false, 256, 144> {};
struct Q5_K : Layout<4, 1, -1, true, false, 256, 176> {};
struct Q6_K : Layout<4, 2, 5, false, true, 256, 210> {};
alignas(16) constexpr uint8_t kTableIQ4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};  // +128
alignas(16) constexpr uint8_t kTableMXFP4[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};           // +16

template <const uint8_t* values, bool wide, class L>
struct Looked : L {
  static constexpr bool kTable = true, kWide = wide;
  static INLINE const uint8_t* table() { return values; }
};
struct IQ4_NL : Looked<kTableIQ4, true, Layout<4, 0, 7, false, false, 32, 18>> {};
struct IQ4_XS : Looked<kTableIQ4, true, Layout<4, 0, 7, false, false, 256, 136>> {};
struct MXFP4 : Looked<kTableMXFP4, false, Layout<4, 0, 4, false, false, 32, 17>> {};

// Where a chunk keeps the parts of its groups.
template <class T>
struct Chunk {
  const uint8_t *scales, *quants;
  INLINE Chunk(const uint8_t* at, int groups) : scales(at), quants(at + groups / T::kBlockGroups * 16 * T::kScaleBytes) {}
  INLINE const uint8_t* record(int g) const { return scales + g / T::kBlockGroups * 16 * T::kScaleBytes; }
  INLINE const uint8_t* group(int g) const { return quants + g * T::kGroupBytes; }
};
// The chunk that holds group `group` of a row of `groups`.
template <class T>
INLINE Chunk<T> chunk_of(const uint8_t* tile, int64_t group, int64_t groups) {
  const int64_t first = group / kChunkGroups * kChunkGroups;
  return {tile + first / kChunkGroups * T::kChunkBytes, int(groups - first < kChunkGroups ? groups - first : kChunkGroups)};
}

// The 8 quads of one group as unsigned bytes.
template <class T>
INLINE void unpack_group(const uint8_t* q, B out[8]) {
  if constexpr (T::kBase == 8) {
    for (int i = 0; i < 8; i++) out[i] = load_bytes(q + 64 * i);
  } else if constexpr (T::kBase == 4) {
    for (int i = 0; i < 4; i++) {
      const B v = load_bytes(q + 64 * i);
      out[i] = low_nibbles(v);
      out[i + 4] = high_nibbles(v);
    }
    if constexpr (T::kTable)
      for (int i = 0; i < 8; i++) out[i] = lookup(out[i], T::table());
    if constexpr (T::kExtra == 1) {
      const B h = load_bytes(q + 256);
      out[0] = either(out[0], field_to<0, 1, 4>(h)); out[1] = either(out[1], field_to<1, 1, 4>(h));
      out[2] = either(out[2], field_to<2, 1, 4>(h)); out[3] = either(out[3], field_to<3, 1, 4>(h));
      out[4] = either(out[4], field_to<4, 1, 4>(h)); out[5] = either(out[5], field_to<5, 1, 4>(h));
      out[6] = either(out[6], field_to<6, 1, 4>(h)); out[7] = either(out[7], field_to<7, 1, 4>(h));
    }
    if constexpr (T::kExtra == 2)
      for (int i = 0; i < 2; i++) {
        const B h = load_bytes(q + 256 + 64 * i);
        out[4 * i] = either(out[4 * i], field_to<0, 3, 4>(h));
        out[4 * i + 1] = either(out[4 * i + 1], field_to<2, 3, 4>(h));
        out[4 * i + 2] = either(out[4 * i + 2], field_to<4, 3, 4>(h));
        out[4 * i + 3] = either(out[4 * i + 3], field_to<6, 3, 4>(h));
      }
  } else {
    for (int i = 0; i < 2; i++) {
      const B v = load_bytes(q + 64 * i);
      out[4 * i] = field_to<0, 3, 0>(v);
      out[4 * i + 1] = field_to<2, 3, 0>(v);
      out[4 * i + 2] = field_to<4, 3, 0>(v);
      out[4 * i + 3] = field_to<6, 3, 0>(v);
    }
    if constexpr (T::kExtra == 1) {
      const B h = load_bytes(q + 128);
      out[0] = either(out[0], field_to<0, 1, 2>(h)); out[1] = either(out[1], field_to<1, 1, 2>(h));
      out[2] = either(out[2], field_to<2, 1, 2>(h)); out[3] = either(out[3], field_to<3, 1, 2>(h));
      out[4] = either(out[4], field_to<4, 1, 2>(h)); out[5] = either(out[5], field_to<5, 1, 2>(h));
      out[6] = either(out[6], field_to<6, 1, 2>(h)); out[7] = either(out[7], field_to<7, 1, 2>(h));
    }
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
