// GGUF rows <-> packed tiles: a permutation of bits in both directions.
#pragma once
#include "dense.h"
#include "tile.h"
#include "transpose.h"
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

// One row's 32 quants out of its 4-byte lanes in the group's vectors (64 bytes apart).
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

// Of the vectors of quads, those bits of each byte that `shift` tells, side by side: 4 of two, 2 of four, 1 of eight.
template <int shift>
INLINE B nibbles(B x, B y) { return either(field_to<shift, 15, 0>(x), field_to<shift, 15, 4>(y)); }
template <int shift>
INLINE B pairs(const B q[4]) {
  return either(either(field_to<shift, 3, 0>(q[0]), field_to<shift, 3, 2>(q[1])), either(field_to<shift, 3, 4>(q[2]), field_to<shift, 3, 6>(q[3])));
}
template <int shift>
INLINE B bits_of(const B q[8]) {
  const B low = either(either(field_to<shift, 1, 0>(q[0]), field_to<shift, 1, 1>(q[1])), either(field_to<shift, 1, 2>(q[2]), field_to<shift, 1, 3>(q[3])));
  const B high = either(either(field_to<shift, 1, 4>(q[4]), field_to<shift, 1, 5>(q[5])), either(field_to<shift, 1, 6>(q[6]), field_to<shift, 1, 7>(q[7])));
  return either(low, high);
}

// 32 bytes of each row hold two groups in their nibbles: 4 vectors of each.
INLINE void pack_nibbles(const uint8_t* rows, int64_t stride, uint8_t* low, uint8_t* high) {
  B q[8];
  load_quads(rows, stride, q);
  load_quads(rows + 16, stride, q + 4);
  for (int v = 0; v < 4; v++) {
    store_bytes(low + 64 * v, nibbles<0>(q[v], q[v + 4]));
    store_bytes(high + 64 * v, nibbles<4>(q[v], q[v + 4]));
  }
}
// 32 bytes of each row hold four groups by 2 bits: 2 vectors of each, a group's `group_bytes` from those of the one before.
INLINE void pack_pairs(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t group_bytes) {
  for (int v = 0; v < 2; v++, out += 64) {
    B q[4];
    load_quads(rows + 16 * v, stride, q);
    store_bytes(out, pairs<0>(q));
    store_bytes(out + group_bytes, pairs<2>(q));
    store_bytes(out + 2 * group_bytes, pairs<4>(q));
    store_bytes(out + 3 * group_bytes, pairs<6>(q));
  }
}
// 32 bytes of each row hold eight groups by single bits.
INLINE void pack_bits(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t group_bytes) {
  B q[8];
  load_quads(rows, stride, q);
  load_quads(rows + 16, stride, q + 4);
  store_bytes(out, bits_of<0>(q));
  store_bytes(out + group_bytes, bits_of<1>(q));
  store_bytes(out + 2 * group_bytes, bits_of<2>(q));
  store_bytes(out + 3 * group_bytes, bits_of<3>(q));
  store_bytes(out + 4 * group_bytes, bits_of<4>(q));
  store_bytes(out + 5 * group_bytes, bits_of<5>(q));
  store_bytes(out + 6 * group_bytes, bits_of<6>(q));
  store_bytes(out + 7 * group_bytes, bits_of<7>(q));
}
// Bit 4q + c of each of 16 dwords -> bit 8c + q: index bits turned by two, which is two perfect unshuffles.
INLINE void deal_bits(uint8_t* dwords) {
  typedef uint32_t lanes __attribute__((vector_size(64)));
  lanes d, t;
  memcpy(&d, dwords, 64);
  for (int twice = 0; twice < 2; twice++) {
    t = (d ^ (d >> 1)) & 0x22222222u; d ^= t ^ (t << 1);
    t = (d ^ (d >> 2)) & 0x0c0c0c0cu; d ^= t ^ (t << 2);
    t = (d ^ (d >> 4)) & 0x00f000f0u; d ^= t ^ (t << 4);
    t = (d ^ (d >> 8)) & 0x0000ff00u; d ^= t ^ (t << 8);
  }
  memcpy(dwords, &d, 64);
}

// The quants of a block of each of 16 rows, `stride` bytes apart, to the vectors of its groups.
template <class T>
INLINE void pack_quants(const uint8_t* rows, int64_t stride, uint8_t* out) {
  constexpr Fields f = fields<T>();
  constexpr int kGroup = T::kGroupBytes, kExtraAt = 64 * T::kBase;
  if constexpr (T::kBase == 8) {
    for (int v = 0; v < 2; v++) {
      B q[4];
      load_quads(rows + f.base + 16 * v, stride, q);
      for (int i = 0; i < 4; i++) store_bytes(out + 256 * v + 64 * i, flip_signs(q[i]));
    }
  } else if constexpr (std::is_same_v<T, Q4_K> || std::is_same_v<T, Q5_K>) {
    for (int p = 0; p < 4; p++) pack_nibbles(rows + f.base + 32 * p, stride, out + 2 * p * kGroup, out + (2 * p + 1) * kGroup);
  } else if constexpr (std::is_same_v<T, Q6_K>) {
    for (int p = 0; p < 4; p++) {
      const int g = p / 2 * 4 + p % 2;
      pack_nibbles(rows + f.base + 32 * p, stride, out + g * kGroup, out + (g + 2) * kGroup);
    }
  } else if constexpr (T::kBase == 2) {
    for (int h = 0; h < 2; h++) pack_pairs(rows + f.base + 32 * h, stride, out + 4 * h * kGroup, kGroup);
  } else {
    for (int g = 0; g < T::kBlockGroups; g++) {
      B q[4];
      load_quads(rows + f.base + 16 * g, stride, q);
      for (int v = 0; v < 4; v++) store_bytes(out + g * kGroup + 64 * v, q[v]);
    }
  }
  if constexpr (std::is_same_v<T, Q5_0> || std::is_same_v<T, Q5_1>) {
    B q[4];
    load_quads(rows + f.extra, stride, q);
    store_bytes(out + kExtraAt, q[0]);
    deal_bits(out + kExtraAt);
  } else if constexpr (T::kExtra == 1) {
    pack_bits(rows + f.extra, stride, out + kExtraAt, kGroup);
  } else if constexpr (T::kExtra == 2) {
    for (int h = 0; h < 2; h++) pack_pairs(rows + f.extra + 32 * h, stride, out + 4 * h * kGroup + kExtraAt, kGroup);
  }
}

// rows: N x row_bytes as in the file; tiles: ceil(N / 16) x 16 * row_bytes
template <class T>
void pack_tiles(const uint8_t* rows, int64_t n, int64_t k, const uint8_t*, uint8_t* tiles, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = k / T::kBlock, row_bytes = blocks * T::kBlockBytes, groups = k / 32;
  for (int64_t t = tile_begin; t < tile_end; t++) {
    uint8_t* tile = tiles + t * 16 * row_bytes;
    const int there = int(n - t * 16 < 16 ? n - t * 16 : 16);
    uint8_t padded[16 * T::kBlockBytes] = {};
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* block = rows + t * 16 * row_bytes + b * T::kBlockBytes;
      int64_t stride = row_bytes;
      if (there < 16) {  // the rows that are not there are zeros
        for (int r = 0; r < there; r++) memcpy(padded + r * T::kBlockBytes, block + r * row_bytes, T::kBlockBytes);
        block = padded;
        stride = T::kBlockBytes;
      }
      const Chunk<T> chunk = chunk_of<T>(tile, b * T::kBlockGroups, groups);
      const int first = int(b * T::kBlockGroups % kChunkGroups);
      pack_quants<T>(block, stride, const_cast<uint8_t*>(chunk.group(first)));
      for (int r = 0; r < 16; r++) move_scales<T, false>(block + r * stride, const_cast<uint8_t*>(chunk.record(first)), r);
    }
  }
}
// Float weights: a tile is (k, 16 rows).
template <class T>
void pack_dense(const uint8_t* rows, int64_t n, int64_t k, const uint8_t*, uint8_t* tiles, int64_t tile_begin, int64_t tile_end) {
  constexpr int kWidth = 16 / T::kBytes;  // of a step along k
  for (int64_t t = tile_begin; t < tile_end; t++) {
    const uint8_t* from = rows + t * 16 * k * T::kBytes;
    uint8_t* to = tiles + t * 16 * k * T::kBytes;
    int64_t i = 0;
    if (n - t * 16 >= 16)
      for (; i + kWidth <= k; i += kWidth) {
        B q[4];
        load_quads(from + i * T::kBytes, k * T::kBytes, q);
        for (int v = 0; v < 4; v++) store_bytes(to + i * 16 * T::kBytes + 64 * v, T::kBytes == 4 ? q[v] : split_halves(q[v]));
      }
    for (; i < k; i++)
      for (int64_t r = 0; r < 16; r++) {
        uint8_t* place = to + (i * 16 + r) * T::kBytes;
        if (t * 16 + r < n) memcpy(place, from + (r * k + i) * T::kBytes, T::kBytes);
        else memset(place, 0, T::kBytes);
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
