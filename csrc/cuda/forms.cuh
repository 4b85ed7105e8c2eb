// The quantization types as kernels see them: a row's codes as words of four int8, and the scales of its groups of 32. What a
// type is, is a set of constants; the planes are those of triton_kernels/layout.py.
#pragma once
#include "args.h"
#include "compat.cuh"

namespace ollamapy::cuda {

enum Scale { kStep, kE8m0, kPairs, kBytes, kNibbles, kSixes };  // layout.py's Scale
enum Min { kNoMin, kAddedMin, kScaledMin };                    // none; + m; - m times a sub-min
enum Table { kNoTable, kIq4, kFp4 };

template <int LOW, int HIGH, int OFFSET, Scale SCALE, int SCALE_OFFSET = 0, Min MIN = kNoMin, Table TABLE = kNoTable>
struct Form {
  static constexpr int kLow = LOW, kHigh = HIGH, kOffset = OFFSET, kScaleOffset = SCALE_OFFSET;
  static constexpr Scale kScale = SCALE;
  static constexpr Min kMin = MIN;
  static constexpr Table kTable = TABLE;
  // Halves of a group have scales of their own.
  static constexpr bool kTwo = SCALE == kBytes || SCALE == kNibbles || (SCALE == kPairs && MIN == kNoMin);
  static constexpr int kLowBytes = LOW * 4, kHighBytes = HIGH * 4;  // of a group
};
using Q4_0 = Form<4, 0, 8, kStep>;
using Q4_1 = Form<4, 0, 0, kStep, 0, kAddedMin>;
using Q5_0 = Form<4, 1, 16, kStep>;
using Q5_1 = Form<4, 1, 0, kStep, 0, kAddedMin>;
using Q8_0 = Form<8, 0, 0, kStep>;
using Q2_K = Form<2, 0, 0, kNibbles, 0, kScaledMin>;
using Q3_K = Form<2, 1, 4, kPairs, 32>;
using Q4_K = Form<4, 0, 0, kPairs, 0, kScaledMin>;
using Q5_K = Form<4, 1, 0, kPairs, 0, kScaledMin>;
using Q6_K = Form<4, 2, 32, kBytes>;
using IQ4_NL = Form<4, 0, 0, kStep, 0, kNoMin, kIq4>;
using IQ4_XS = Form<4, 0, 0, kSixes, 32, kNoMin, kIq4>;
using MXFP4 = Form<4, 0, 0, kE8m0, 0, kNoMin, kFp4>;

// Four 2-bit fields of a byte, or four bits, each to a byte of its own.
__device__ __forceinline__ uint32_t spread2(uint32_t bits) {
  const uint32_t pairs = (bits & 0x0F) | (bits & 0xF0) << 12;
  return (pairs | pairs << 6) & 0x03030303u;
}
__device__ __forceinline__ uint32_t spread1(uint32_t bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }

// Each nibble of q by a table of 16 int8: low nibbles, high nibbles.
template <Table TABLE>
__device__ __forceinline__ void look_up(uint32_t q, uint32_t& low, uint32_t& high) {
  constexpr uint32_t t0 = TABLE == kIq4 ? 0xBFAD9881u : 0x03020100u, t1 = TABLE == kIq4 ? 0xF6EADDCFu : 0x0C080604u;
  constexpr uint32_t t2 = TABLE == kIq4 ? 0x26190D01u : 0xFDFEFF00u, t3 = TABLE == kIq4 ? 0x71594535u : 0xF4F8FAFCu;
  const uint32_t index = q & 0x77777777u, upper = 0x32103210u | (q & 0x88888888u) >> 1;
  const uint32_t a = __byte_perm(__byte_perm(t0, t1, index), __byte_perm(t2, t3, index), upper);
  const uint32_t b = __byte_perm(__byte_perm(t0, t1, index >> 16), __byte_perm(t2, t3, index >> 16), upper >> 16);
  low = __byte_perm(a, b, 0x6420);
  high = __byte_perm(a, b, 0x7531);
}

// Weights 4t... of both halves of a group as int8. low0 and low1: its words t (4 bits), t and t + 4 (8 bits), or both (2 bits);
// high0 and high1: its high bits.
template <class F>
__device__ __forceinline__ void unpack(uint32_t low0, uint32_t low1, uint32_t high0, uint32_t high1, int t, uint32_t& first, uint32_t& second) {
  if constexpr (F::kTable != kNoTable) {
    look_up<F::kTable>(low0, first, second);
  } else if constexpr (F::kLow == 8) {
    first = low0;
    second = low1;
  } else if constexpr (F::kLow == 4) {
    first = low0 & 0x0F0F0F0Fu;
    second = low0 >> 4 & 0x0F0F0F0Fu;
  } else {
    first = spread2(low0 >> 8 * t & 255);
    second = spread2(low1 >> 8 * t & 255);
  }
  if constexpr (F::kHigh == 1) {
    first |= spread1(high0 >> 4 * t) << F::kLow;
    second |= spread1(high0 >> (16 + 4 * t)) << F::kLow;
  } else if constexpr (F::kHigh == 2) {
    first |= spread2(high0 >> 8 * t & 255) << F::kLow;
    second |= spread2(high1 >> 8 * t & 255) << F::kLow;
  }
  if constexpr (F::kOffset != 0) {  // codes are below 128: no borrow crosses a byte
    first = ((first | 0x80808080u) - F::kOffset * 0x01010101u) ^ 0x80808080u;
    second = ((second | 0x80808080u) - F::kOffset * 0x01010101u) ^ 0x80808080u;
  }
}

// The scale bytes of groups 2j and 2j + 1 of a row, as they lie there.
struct RawScales {
  uint32_t a, b, d, m;
};

__device__ __forceinline__ uint32_t load16(const uint8_t* plane, int64_t index) { return __ldg(reinterpret_cast<const uint16_t*>(plane) + index); }
__device__ __forceinline__ uint32_t load32(const uint8_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }

// `pair`: j. Where `groups` is odd, the last pair has one group.
template <class F>
__device__ __forceinline__ RawScales load_scales(const Planes& planes, int64_t row, int pair, int groups) {
  RawScales raw = {0, 0, 0, 0};
  const int g = 2 * pair;
  if constexpr (F::kScale == kStep || F::kScale == kE8m0) {
    const int64_t at = row * groups + g, next = at + (g + 1 < groups);
    if constexpr (F::kScale == kStep)
      raw.d = load16(planes.d, at) | load16(planes.d, next) << 16;
    else
      raw.d = __ldg(planes.d + at) | uint32_t(__ldg(planes.d + next)) << 16;
    if constexpr (F::kMin != kNoMin) raw.m = load16(planes.m, at) | load16(planes.m, next) << 16;
  } else {
    const int64_t block = row * (groups / 8) + g / 8;
    raw.d = load16(planes.d, block);
    if constexpr (F::kMin != kNoMin) raw.m = load16(planes.m, block);
    if constexpr (F::kScale == kPairs) {
      const uint8_t* scales = planes.scales + row * (groups + groups / 2);
      raw.a = load16(scales, pair);
      raw.b = __ldg(scales + groups + pair);
    } else if constexpr (F::kScale == kSixes) {
      const uint8_t* scales = planes.scales + row * (groups / 2 + groups / 4);
      raw.a = __ldg(scales + pair);
      raw.b = __ldg(scales + groups / 2 + pair / 2) >> 4 * (pair & 1);
    } else {
      raw.a = load32(planes.scales + (row * groups + g) * 2);
    }
  }
  return raw;
}

// What a group's integer dots are multiplied with. `scales`, `mins`: int16 of both halves, where halves have their own.
struct GroupScale {
  float f, g;
  uint32_t scales, mins;
};

__device__ __forceinline__ uint32_t halves(int first, int second) { return uint32_t(first & 0xFFFF) | uint32_t(second) << 16; }
__device__ __forceinline__ int first_half(uint32_t both) { return int16_t(both & 0xFFFF); }
__device__ __forceinline__ int second_half(uint32_t both) { return int32_t(both) >> 16; }

// Group `odd` of the pair. Products of a float16 step and a 6-bit scale are exact in float32.
template <class F>
__device__ __forceinline__ GroupScale decode_scale(const RawScales& raw, int odd) {
  GroupScale s = {0.0f, 0.0f, 0, 0};
  if constexpr (F::kScale == kE8m0) {
    const uint32_t e = raw.d >> 16 * odd & 255;  // half of 2^(e - 127): the table is doubled
    s.f = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  } else if constexpr (F::kScale == kStep) {
    s.f = ptx::from_half(uint16_t(raw.d >> 16 * odd));
    if constexpr (F::kMin == kAddedMin) s.g = -ptx::from_half(uint16_t(raw.m >> 16 * odd));
  } else {
    const float d = ptx::from_half(uint16_t(raw.d)), m = F::kMin == kNoMin ? 0.0f : ptx::from_half(uint16_t(raw.m));
    if constexpr (F::kScale == kPairs) {
      const int low = raw.a >> 8 * odd & 255, high = raw.b >> 4 * odd & 15;
      const int one = ((low & 15) | (high & 3) << 4) - F::kScaleOffset, two = (low >> 4 | high >> 2 << 4) - F::kScaleOffset;
      if constexpr (F::kTwo) {
        s.f = d;
        s.scales = halves(one, two);
      } else {
        s.f = __fmul_rn(d, float(one));
        s.g = __fmul_rn(m, float(two));
      }
    } else if constexpr (F::kScale == kSixes) {
      s.f = __fmul_rn(d, float(int((raw.a >> 4 * odd & 15) | (raw.b >> 2 * odd & 3) << 4) - F::kScaleOffset));
    } else {
      const int one = raw.a >> 16 * odd & 255, two = raw.a >> (16 * odd + 8) & 255;
      s.f = d;
      s.g = m;
      s.scales = F::kScale == kBytes ? halves(int8_t(one), int8_t(two)) : halves(one & 15, two & 15);
      if constexpr (F::kScale == kNibbles) s.mins = halves(one >> 4, two >> 4);
    }
  }
  return s;
}

// THE accumulation: a group's exact integer dots (of both halves, or all in dot0) enter the sum of floats. Every kernel adds groups
// through this function and in one order, so that an output has the same bits at any number of tokens:
// pair j of groups belongs to partial sum j % 8, in the order of j; partial sums are added as ((0+4)+(2+6))+((1+5)+(3+7)).
template <class F>
__device__ __forceinline__ void add_group(float& sum, const GroupScale& w, const Meta& x, int dot0, int dot1) {
  const int dot = F::kTwo ? first_half(w.scales) * dot0 + second_half(w.scales) * dot1 : dot0;
  sum = __fmaf_rn(__fmul_rn(w.f, x.scale), float(dot), sum);
  if constexpr (F::kMin != kNoMin) {
    const int taken = F::kTwo ? first_half(w.mins) * first_half(x.sums) + second_half(w.mins) * second_half(x.sums)
                              : first_half(x.sums) + second_half(x.sums);
    sum = __fmaf_rn(-w.g, __fmul_rn(x.scale, float(taken)), sum);
  }
}

// An output's sum to its place.
__device__ __forceinline__ void finish(const LinearArgs& args, int token, int row, float sum) {
  const int64_t at = token * args.stride + row;
  if (args.bias) sum += args.bias[row];
  if (args.add) sum += ptx::load_float(args.out, at, args.type);
  ptx::store_float(args.out, at, sum, args.type);
}

}  // namespace ollamapy::cuda
