// GGUF rows <-> packed tiles: a permutation of bits in both directions.
#pragma once
#include "tile.h"
#include <type_traits>

namespace ollamapy::OLLAMAPY_ISA {
namespace {

template <class T> constexpr int bits = T::kBase + T::kExtra;

// Byte offsets of the parts of a GGUF block: quants (base part), extra bits, and where its scale bytes are.
struct Fields { int base, extra, half[2], halves, byte, bytes; };
template <class T>
constexpr Fields fields() {
  if constexpr (std::is_same_v<T, Q4_0> || std::is_same_v<T, IQ4_NL> || std::is_same_v<T, Q8_0>) return {2, 0, {0, 0}, 1, 0, 0};
  else if constexpr (std::is_same_v<T, Q4_1>) return {4, 0, {0, 2}, 2, 0, 0};
  else if constexpr (std::is_same_v<T, Q5_0>) return {6, 2, {0, 0}, 1, 0, 0};
  else if constexpr (std::is_same_v<T, Q5_1>) return {8, 4, {0, 2}, 2, 0, 0};
  else if constexpr (std::is_same_v<T, MXFP4>) return {1, 0, {0, 0}, 0, 0, 1};
  else if constexpr (std::is_same_v<T, Q2_K>) return {16, 0, {80, 82}, 2, 0, 16};
  else if constexpr (std::is_same_v<T, Q3_K>) return {32, 0, {108, 0}, 1, 96, 12};
  else if constexpr (std::is_same_v<T, Q4_K>) return {16, 0, {0, 2}, 2, 4, 12};
  else if constexpr (std::is_same_v<T, Q5_K>) return {48, 16, {0, 2}, 2, 4, 12};
  else if constexpr (std::is_same_v<T, Q6_K>) return {0, 128, {208, 0}, 1, 192, 16};
  else return {8, 0, {0, 0}, 1, 2, 6};  // IQ4_XS
}

// Where element i (0..31) of group g of a block keeps its base bits: byte offset and shift; likewise its extra bits.
struct Place { int byte, shift; };
template <class T>
constexpr Place base_place(int g, int i) {
  constexpr int at = fields<T>().base;
  if constexpr (T::kBase == 8) return {at + i, 0};
  else if constexpr (std::is_same_v<T, Q4_K> || std::is_same_v<T, Q5_K>) return {at + 32 * (g / 2) + i, 4 * (g % 2)};
  else if constexpr (std::is_same_v<T, Q6_K>) return {at + 64 * (g / 4) + 32 * (g % 2) + i, 4 * (g % 4 / 2)};
  else if constexpr (T::kBase == 2) return {at + 32 * (g / 4) + i, 2 * (g % 4)};
  else return {at + 16 * g + i % 16, 4 * (i / 16)};
}
template <class T>
constexpr Place extra_place(int g, int i) {
  constexpr int at = fields<T>().extra;
  if constexpr (std::is_same_v<T, Q5_0> || std::is_same_v<T, Q5_1>) return {at + i / 8, i % 8};
  else if constexpr (std::is_same_v<T, Q6_K>) return {at + 32 * (g / 4) + i, 2 * (g % 4)};
  else return {at + i, g};
}

template <class T>
INLINE void read_group(const uint8_t* block, int g, uint8_t b[32]) {
  for (int i = 0; i < 32; i++) {
    const Place p = base_place<T>(g, i);
    b[i] = uint8_t((block[p.byte] >> p.shift) & ((1 << T::kBase) - 1));
    if constexpr (T::kBase == 8) b[i] ^= 0x80;
  }
  if constexpr (T::kExtra > 0)
    for (int i = 0; i < 32; i++) {
      const Place p = extra_place<T>(g, i);
      b[i] |= uint8_t(((block[p.byte] >> p.shift) & ((1 << T::kExtra) - 1)) << T::kBase);
    }
}
template <class T>
INLINE void write_group(uint8_t* block, int g, const uint8_t b[32]) {
  for (int i = 0; i < 32; i++) {
    const Place p = base_place<T>(g, i);
    const uint8_t v = T::kBase == 8 ? b[i] ^ 0x80 : b[i] & ((1 << T::kBase) - 1);
    block[p.byte] = uint8_t(block[p.byte] | (v << p.shift));
    if constexpr (T::kExtra > 0) {
      const Place e = extra_place<T>(g, i);
      block[e.byte] = uint8_t(block[e.byte] | ((b[i] >> T::kBase) << e.shift));
    }
  }
}

// One row's 32 quants <-> its 4-byte lanes in the group's vectors (64 bytes apart).
template <class T>
INLINE void put_lane(uint8_t* q, const uint8_t b[32]) {
  uint8_t lane[8][4] = {};
  int n = 0;
  if constexpr (T::kBase == 8) { memcpy(lane, b, 32); n = 8; }
  else if constexpr (T::kBase == 4) {
    for (int i = 0; i < 16; i++) lane[i / 4][i % 4] = uint8_t((b[i] & 15) | (b[i + 16] << 4));
    n = 4;
  } else {
    for (int i = 0; i < 32; i++) lane[i / 16][i % 4] |= uint8_t((b[i] & 3) << (2 * (i / 4 % 4)));
    n = 2;
  }
  if constexpr (T::kExtra == 1) {
    for (int i = 0; i < 32; i++) lane[n][i % 4] |= uint8_t((b[i] >> T::kBase) << (i / 4));
    n += 1;
  }
  if constexpr (T::kExtra == 2) {
    for (int i = 0; i < 32; i++) lane[n + i / 16][i % 4] |= uint8_t((b[i] >> T::kBase) << (2 * (i / 4 % 4)));
    n += 2;
  }
  for (int v = 0; v < n; v++) memcpy(q + 64 * v, lane[v], 4);
}
template <class T>
INLINE void get_lane(const uint8_t* q, uint8_t b[32]) {
  constexpr int kExtraAt = 64 * T::kBase;
  for (int i = 0; i < 32; i++) {
    const int quad = i / 4, c = i % 4;
    if constexpr (T::kBase == 8) b[i] = q[64 * quad + c];
    else if constexpr (T::kBase == 4) b[i] = uint8_t((q[64 * (quad % 4) + c] >> (4 * (quad / 4))) & 15);
    else b[i] = uint8_t((q[64 * (quad / 4) + c] >> (2 * (quad % 4))) & 3);
    if constexpr (T::kExtra == 1) b[i] |= uint8_t(((q[kExtraAt + c] >> quad) & 1) << T::kBase);
    if constexpr (T::kExtra == 2) b[i] |= uint8_t(((q[kExtraAt + 64 * (quad / 4) + c] >> (2 * (quad % 4))) & 3) << T::kBase);
  }
}

// The scale record of one block, row r: halves first (16 x 2 bytes each), then single bytes (16 each)
template <class T, bool unpack>
INLINE void move_scales(std::conditional_t<unpack, uint8_t, const uint8_t>* block, std::conditional_t<unpack, const uint8_t, uint8_t>* s, int r) {
  constexpr Fields f = fields<T>();
  for (int h = 0; h < f.halves; h++) {
    if constexpr (unpack) memcpy(block + f.half[h], s + 32 * h + 2 * r, 2);
    else memcpy(s + 32 * h + 2 * r, block + f.half[h], 2);
  }
  for (int i = 0; i < f.bytes; i++) {
    if constexpr (unpack) block[f.byte + i] = s[32 * f.halves + 16 * i + r];
    else s[32 * f.halves + 16 * i + r] = block[f.byte + i];
  }
}

// rows: N x row_bytes as in the file; tiles: ceil(N / 16) x 16 * row_bytes
template <class T>
void pack_tiles(const uint8_t* rows, int64_t n, int64_t k, uint8_t* tiles, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = k / T::kBlock, row_bytes = blocks * T::kBlockBytes, groups = k / 32;
  for (int64_t t = tile_begin; t < tile_end; t++) {
    uint8_t* tile = tiles + t * 16 * row_bytes;
    if ((t + 1) * 16 > n) memset(tile, 0, size_t(16 * row_bytes));
    for (int r = 0; r < 16 && t * 16 + r < n; r++)
      for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = rows + (t * 16 + r) * row_bytes + b * T::kBlockBytes;
        const Chunk<T> chunk = chunk_of<T>(tile, b * T::kBlockGroups, groups);
        const int first = int(b * T::kBlockGroups % kChunkGroups);
        for (int g = 0; g < T::kBlockGroups; g++) {
          uint8_t quants[32];
          read_group<T>(block, g, quants);
          put_lane<T>(const_cast<uint8_t*>(chunk.group(first + g)) + 4 * r, quants);
        }
        move_scales<T, false>(block, const_cast<uint8_t*>(chunk.record(first)), r);
      }
  }
}
template <class T>
void unpack_row(const uint8_t* tiles, int64_t k, int64_t row, uint8_t* out) {
  const int64_t blocks = k / T::kBlock, row_bytes = blocks * T::kBlockBytes, r = row % 16;
  const uint8_t* tile = tiles + row / 16 * 16 * row_bytes;
  memset(out, 0, size_t(row_bytes));
  for (int64_t b = 0; b < blocks; b++, out += T::kBlockBytes) {
    const Chunk<T> chunk = chunk_of<T>(tile, b * T::kBlockGroups, k / 32);
    const int first = int(b * T::kBlockGroups % kChunkGroups);
    for (int g = 0; g < T::kBlockGroups; g++) {
      uint8_t quants[32];
      get_lane<T>(chunk.group(first + g) + 4 * r, quants);
      write_group<T>(out, g, quants);
    }
    move_scales<T, true>(out, chunk.record(first), int(r));
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
