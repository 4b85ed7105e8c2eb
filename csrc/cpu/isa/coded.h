// Types whose weights are each one of 16 values times a scale of 16 or 32 k: the codebook types (IQ1 to IQ3), ternary ones, NVFP4.
//
// A tile holds them looked up: a block of a row is the float32 scale of 32 k, or two of 16, then 16 bytes, byte j with the numbers
// of values j and j + 16 in its nibbles. So they take 5 or 6 bits a weight, where the file's 1.5 to 4.5 cannot be read at the speed
// of memory. Codebooks come from `ollamapy.quant.coded` as tables of such numbers.
#pragma once
#include "tile.h"

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

// 32 weights: their scale, or those of 16 each, and their numbers as in a block.
struct Group {
  float scale[2];
  uint64_t numbers[2];
};

// Words are eight bytes side by side, a number each.
constexpr uint64_t kOnes = 0x0101010101010101, kSevens = 7 * kOnes, kNibbles = 15 * kOnes, kEven = 0x00ff00ff00ff00ff;
template <class T>
INLINE T load_word(const uint8_t* p) { T x; memcpy(&x, p, sizeof x); return x; }

// eight(i): the numbers of weights 8 i to 8 i + 7
template <class Eight>
INLINE Group group_of(const Eight& eight, float first, float second) {
  return {{first, second}, {eight(0) | eight(2) << 4, eight(1) | eight(3) << 4}};
}
template <class Eight>
INLINE Group group_of(const Eight& eight, float scale) { return group_of(eight, scale, scale); }

// Bit i of a byte as byte i: all ones or zeros.
INLINE uint64_t spread(uint32_t bits) {
  const uint64_t own = (bits * kOnes) & 0x8040201008040201;
  const uint64_t top = (own + 0x7f7f7f7f7f7f7f7f) & 0x8080808080808080;
  return (top << 1) - (top >> 7);
}
INLINE uint32_t with_parity(uint32_t bits) { return bits | uint32_t(__builtin_parity(bits)) << 7; }  // 7 signs, an even number of them
INLINE float odd(uint32_t number) { return float(2 * number + 1); }
INLINE float half_at(const uint8_t* p) { return half_to_float(load_word<half_bits>(p)); }

// An entry of a codebook: its values' numbers, then those of the negatives, which the mask's ones choose.
INLINE uint64_t choose(uint64_t plus, uint64_t minus, uint64_t mask) { return plus ^ ((plus ^ minus) & mask); }
INLINE uint64_t entry_of_8(const uint8_t* book, uint32_t index, uint64_t mask) {
  const uint8_t* entry = book + 16 * index;
  return choose(load_word<uint64_t>(entry), load_word<uint64_t>(entry + 8), mask);
}
INLINE uint64_t entries_of_4(const uint8_t* book, uint32_t index, uint32_t next, uint64_t mask) {
  const uint64_t a = load_word<uint64_t>(book + 8 * index), b = load_word<uint64_t>(book + 8 * next);
  return choose((a & 0xffffffff) | b << 32, a >> 32 | (b >> 32 << 32), mask);
}

// How the file keeps a type: `weights` in blocks of `bytes`, looked up in so many bytes of a table, held as T; and group g of a block.
template <class T, int weights, int bytes, int table_bytes>
struct File {
  using Held = T;
  static constexpr int kBlock = weights, kBytes = bytes, kTableBytes = table_bytes;
};

struct FileIQ2_XXS : File<IQ2Per32, 256, 66, 256 * 16> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const uint8_t* codes = b + 2 + 8 * g;
    const uint32_t rest = load_word<uint32_t>(codes + 4);
    return group_of([&](int i) { return entry_of_8(book, codes[i], spread(with_parity(rest >> (7 * i) & 127))); },
                    odd(rest >> 28) * (half_at(b) * 0.125f));
  }
};
struct FileIQ2_XS : File<IQ2Per16, 256, 74, 512 * 16> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const float step = half_at(b) * 0.125f;
    const auto eight = [&](int i) {
      const uint32_t code = load_word<uint16_t>(b + 2 + 8 * g + 2 * i);
      return entry_of_8(book, code & 511, spread(with_parity(code >> 9)));
    };
    return group_of(eight, odd(b[66 + g] & 15) * step, odd(b[66 + g] >> 4) * step);
  }
};
struct FileIQ2_S : File<IQ2Per16, 256, 82, 1024 * 16> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const float step = half_at(b) * 0.125f;
    const auto eight = [&](int i) { return entry_of_8(book, b[2 + 4 * g + i] | (b[66 + g] >> (2 * i) & 3) << 8, spread(b[34 + 4 * g + i])); };
    return group_of(eight, odd(b[74 + g] & 15) * step, odd(b[74 + g] >> 4) * step);
  }
};
struct FileIQ3_XXS : File<IQ3Per32, 256, 98, 256 * 8> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const uint8_t* codes = b + 2 + 8 * g;
    const uint32_t rest = load_word<uint32_t>(b + 66 + 4 * g);
    const auto eight = [&](int i) { return entries_of_4(book, codes[2 * i], codes[2 * i + 1], spread(with_parity(rest >> (7 * i) & 127))); };
    return group_of(eight, odd(rest >> 28) * (half_at(b) * 0.25f));
  }
};
struct FileIQ3_S : File<OddPer32, 256, 110, 512 * 8> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const auto code = [&](int i) { return b[2 + 8 * g + i] | uint32_t(b[66 + g] >> i & 1) << 8; };
    const auto eight = [&](int i) { return entries_of_4(book, code(2 * i), code(2 * i + 1), spread(b[74 + 4 * g + i])); };
    return group_of(eight, odd(b[106 + g / 2] >> (4 * (g % 2)) & 15) * half_at(b));
  }
};
// Of IQ1 an entry is 8 x + 1 of eight x, and its "negatives" are 8 x - 1.
struct FileIQ1_S : File<OddPer32, 256, 50, 2048 * 16> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    const uint32_t high = load_word<uint16_t>(b + 34 + 2 * g);
    const uint64_t mask = high & 0x8000 ? ~uint64_t(0) : 0;
    return group_of([&](int i) { return entry_of_8(book, b[2 + 4 * g + i] | (high >> (3 * i) & 7) << 8, mask); },
                    odd(high >> 12 & 7) * (half_at(b) * 0.125f));
  }
};
struct FileIQ1_M : File<OddPer16, 256, 56, 2048 * 16> {
  static INLINE Group group(const uint8_t* b, const uint8_t* book, int g) {
    uint32_t bits = 0;  // of the step: the top four of each of the scales' words
    for (int i = 0; i < 4; i++) bits |= uint32_t(b[49 + 2 * i] >> 4) << (4 * i);
    const float step = half_to_float(half_bits(bits)) * 0.125f;
    const uint32_t scales = uint32_t(load_word<uint16_t>(b + 48 + g / 2 * 2)) >> (6 * (g % 2));
    const auto eight = [&](int i) {
      const uint32_t high = b[32 + 2 * g + i / 2] >> (4 * (i % 2));
      return entry_of_8(book, b[4 * g + i] | (high & 7) << 8, high & 8 ? ~uint64_t(0) : 0);
    };
    return group_of(eight, odd(scales & 7) * step, odd(scales >> 3 & 7) * step);
  }
};

// 0, 1, 2, 3 in each byte -> the numbers of -1, 0, 1, 2 among FP4's values.
INLINE uint64_t less_one(uint64_t fields) {
  const uint64_t less = (fields + kNibbles) & kNibbles;
  return less - (less >> 3 & kOnes) * 6;  // 15 -> 9
}
// Digit `place` of bytes that are ternary fractions, rounded up: 5 digits each, the first in place 0.
INLINE uint64_t ternary_digit(uint64_t bytes, int place) {
  constexpr uint64_t powers[] = {1, 3, 9, 27, 81};
  const auto of_four = [&](uint64_t x) { return (x * powers[place] & kEven) * 3 >> 8 & kEven; };
  return of_four(bytes & kEven) | of_four(bytes >> 8 & kEven) << 8;
}
struct FileTQ1_0 : File<FP4Per32, 256, 54, 0> {  // digits of 32 bytes, then of 16, then four of the last 4
  static INLINE Group group(const uint8_t* b, const uint8_t*, int g) {
    const auto eight = [&](int i) {
      const int at = 4 * g + i - 20;
      if (at < 0) return less_one(ternary_digit(load_word<uint64_t>(b + 8 * i), g));
      if (at < 10) return less_one(ternary_digit(load_word<uint64_t>(b + 32 + at % 2 * 8), at / 2));
      const uint64_t last = load_word<uint32_t>(b + 48);
      return less_one(ternary_digit(last, at * 2 - 20) | ternary_digit(last, at * 2 - 19) << 32);
    };
    return group_of(eight, half_at(b + 52));
  }
};
struct FileTQ2_0 : File<FP4Per32, 256, 66, 0> {
  static INLINE Group group(const uint8_t* b, const uint8_t*, int g) {
    const auto eight = [&](int i) { return less_one(load_word<uint64_t>(b + g / 4 * 32 + 8 * i) >> (g % 4 * 2) & 3 * kOnes); };
    return group_of(eight, half_at(b + 64));
  }
};
struct FileQ2_0 : File<FP4Per32, 64, 18, 0> {
  static INLINE Group group(const uint8_t* b, const uint8_t*, int g) {
    const auto eight = [&](int i) {
      uint64_t x = load_word<uint16_t>(b + 2 + 8 * g + 2 * i);
      x = (x | x << 24) & 0x000000ff000000ff;
      x = (x | x << 12) & 0x000f000f000f000f;
      return less_one((x | x << 6) & 3 * kOnes);
    };
    return group_of(eight, half_at(b));
  }
};
struct FileQ1_0 : File<OddPer32, 128, 18, 0> {  // -1 and 1 are numbers 7 and 8
  static INLINE Group group(const uint8_t* b, const uint8_t*, int g) {
    return group_of([&](int i) { return kSevens + (spread(b[2 + 4 * g + i]) & kOnes); }, half_at(b));
  }
};
struct FileNVFP4 : File<FP4Per16, 64, 36, 256 * 4> {  // the table: the scale that each byte stands for
  static INLINE Group group(const uint8_t* b, const uint8_t* scales, int g) {
    const auto eight = [&](int i) {
      const uint64_t x = load_word<uint64_t>(b + 4 + 16 * g + i / 2 * 8) >> (i % 2 * 4) & kNibbles;
      return x & (kSevens | ((x & kSevens) + kSevens));  // there is one zero
    };
    const auto scale = [&](int half) { return load_word<float>(scales + 4 * b[2 * g + half]); };
    return group_of(eight, scale(0), scale(1));
  }
};

template <class F>
void pack_coded(const uint8_t* rows, int64_t n, int64_t k, const uint8_t* table, uint8_t* tiles, int64_t tile_begin, int64_t tile_end) {
  using T = typename F::Held;
  constexpr int kGroups = F::kBlock / 32;
  const int64_t groups = k / 32, blocks = k / F::kBlock, row_bytes = groups * T::kBlockBytes, file_bytes = blocks * F::kBytes;
  for (int64_t t = tile_begin; t < tile_end; t++) {
    uint8_t* tile = tiles + t * 16 * row_bytes;
    const int there = int(n - t * 16 < 16 ? n - t * 16 : 16);
    if (there < 16) memset(tile, 0, size_t(16 * row_bytes));
    for (int64_t b = 0; b < blocks; b++) {
      const Chunk<T> chunk = chunk_of<T>(tile, b * kGroups, groups);
      const int first = int(b * kGroups % kChunkGroups);
      for (int r = 0; r < there; r++) {
        const uint8_t* block = rows + (t * 16 + r) * file_bytes + b * F::kBytes;
        for (int g = 0; g < kGroups; g++) {
          const Group x = F::group(block, table, g);
          uint8_t *scales = const_cast<uint8_t*>(chunk.record(first + g)), *quants = const_cast<uint8_t*>(chunk.group(first + g));
          for (int h = 0; h < T::kScaleBytes / 4; h++) memcpy(scales + 64 * h + 4 * r, x.scale + h, 4);
          for (int v = 0; v < 4; v++) memcpy(quants + 64 * v + 4 * r, reinterpret_cast<const uint8_t*>(x.numbers) + 4 * v, 4);
        }
      }
    }
  }
}
// A row's blocks as the tile has them: not the file's.
template <class T>
void unpack_coded(const uint8_t* tiles, int64_t k, int64_t row, uint8_t* out) {
  const int64_t groups = k / 32, r = row % 16;
  for (int64_t g = 0; g < groups; g++, out += T::kBlockBytes) {
    const Chunk<T> chunk = chunk_of<T>(tiles + row / 16 * 16 * groups * T::kBlockBytes, g, groups);
    const int at = int(g % kChunkGroups);
    for (int h = 0; h < T::kScaleBytes / 4; h++) memcpy(out + 4 * h, chunk.record(at) + 64 * h + 4 * r, 4);
    for (int v = 0; v < 4; v++) memcpy(out + T::kScaleBytes + 4 * v, chunk.group(at) + 64 * v + 4 * r, 4);
  }
}
}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
