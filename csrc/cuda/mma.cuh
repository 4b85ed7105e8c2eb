// Any number of tokens: integer dots on tensor cores, mma.m16n8k32 (k16 where halves of a group have scales of their own), whose K
// is a quantization group. Rows of the matrix are the M of the mma, tokens its N.
//
// A block has 16 * TILES rows and 8 * COLUMNS tokens. Its eight warps share no output but K: warp w takes the pairs of groups whose
// partial sum is w (see `add_group`). Codes come through a ring of STAGES steps of 16 groups, in the background; scales are decoded
// once for all tokens, one step ahead; activations, which no two warps of a block share, come straight from L2.
#pragma once
#include "forms.cuh"

namespace ollamapy::cuda {

constexpr int kWarps = 8, kMmaThreads = 32 * kWarps;
constexpr int kStep16 = 16;  // groups of a step: a pair for each warp

template <int N>
struct Bytes {
  static constexpr int value = N;
};

template <class F, int TILES, int COLUMNS>
struct MmaShape {
  static constexpr int kRows = 16 * TILES, kTokens = 8 * COLUMNS;
  static constexpr int kStages = F::kLow == 8 ? 3 : 4;
  // Rows are 16 bytes longer than their codes: eight rows then lie in different banks.
  static constexpr int kLowRow = F::kLowBytes * kStep16 + 16;
  static constexpr int kHighRow = F::kHigh ? F::kHighBytes * kStep16 + 16 : 0;
  static constexpr int kStage = kRows * (kLowRow + kHighRow);
  static constexpr int kScales = kStep16 * kRows * int(sizeof(GroupScale));
  static constexpr int kReduce = kWarps / 2 * kRows * kTokens * 4;
  static constexpr int kRing = kStages * kStage + 2 * kScales;
  static constexpr int kShared = kRing > kReduce ? kRing : kReduce;
};

// The codes of groups [16 step, 16 step + 16) to a stage of the ring. Groups beyond the last are left out, rows beyond repeat it.
template <class F, int TILES, int COLUMNS>
__device__ __forceinline__ void copy_step(unsigned char* stage, const Planes& planes, int first_row, int rows, int groups, int step) {
  using S = MmaShape<F, TILES, COLUMNS>;
  if (step * kStep16 >= groups) return;
  const auto copy = [&](auto size, const uint8_t* plane, unsigned char* to, int row_bytes, int group_bytes) {
    constexpr int kBytes = decltype(size)::value;
    const int each = group_bytes * kStep16 / kBytes;
    for (int i = threadIdx.x; i < S::kRows * each; i += kMmaThreads) {
      const int row = i / each, byte = i % each * kBytes, group = step * kStep16 + byte / group_bytes;
      if (group >= groups) continue;
      const int64_t from = (int64_t(min(first_row + row, rows - 1)) * groups + step * kStep16) * group_bytes + byte;
      ptx::copy_async<kBytes>(to + row * row_bytes + byte, plane + from);
    }
  };
  copy(Bytes<16>{}, planes.low, stage, S::kLowRow, F::kLowBytes);
  // High bits of the legacy types are 4 bytes a group, and rows may have an odd number of groups.
  if constexpr (F::kHigh == 1) copy(Bytes<4>{}, planes.high, stage + S::kRows * S::kLowRow, S::kHighRow, F::kHighBytes);
  if constexpr (F::kHigh == 2) copy(Bytes<16>{}, planes.high, stage + S::kRows * S::kLowRow, S::kHighRow, F::kHighBytes);
}

// Fragment of a tile of 16 rows: group `group` of the step, rows lane / 4 and that + 8.
template <class F, int TILES, int COLUMNS>
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], const unsigned char* stage, int tile, int group) {
  using S = MmaShape<F, TILES, COLUMNS>;
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = 16 * tile + 8 * half + lane / 4;
    const uint32_t* low = reinterpret_cast<const uint32_t*>(stage + row * S::kLowRow + group * F::kLowBytes);
    const uint32_t* high = reinterpret_cast<const uint32_t*>(stage + S::kRows * S::kLowRow + row * S::kHighRow + group * F::kHighBytes);
    const uint32_t low0 = F::kLow == 2 ? low[0] : low[t], low1 = F::kLow == 2 ? low[1] : F::kLow == 8 ? low[4 + t] : 0;
    const uint32_t high0 = F::kHigh ? high[0] : 0, high1 = F::kHigh == 2 ? high[1] : 0;
    unpack<F>(low0, low1, high0, high1, t, a[half], a[2 + half]);
  }
}

// Scales of the step's groups, one (row, pair) a thread.
template <class F, int TILES>
struct StepScales {
  static constexpr int kEach = 16 * TILES * 8 / kMmaThreads;
  RawScales raw[kEach] = {};

  __device__ __forceinline__ void load(const Planes& planes, int first_row, int rows, int groups, int step) {
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int item = threadIdx.x + i * kMmaThreads, pair = step * 8 + item % 8;
      if (2 * pair < groups) raw[i] = load_scales<F>(planes, min(first_row + item / 8, rows - 1), pair, groups);
    }
  }
  __device__ __forceinline__ void store(GroupScale* to, int groups, int step) const {
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int item = threadIdx.x + i * kMmaThreads, pair = item % 8;
      if (2 * (step * 8 + pair) >= groups) continue;
#pragma unroll
      for (int odd = 0; odd < 2; odd++) to[(2 * pair + odd) * 16 * TILES + item / 8] = decode_scale<F>(raw[i], odd);
    }
  }
};

// One group of the warp: all its rows with all its tokens.
template <class F, int TILES, int COLUMNS>
__device__ __forceinline__ void mma_group(float (&sums)[TILES][COLUMNS][4], const unsigned char* stage, const GroupScale* scales,
                                          const Activations& x, int first_token, int group, int at) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  uint32_t a[TILES][4];
  GroupScale scale[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    load_fragment<F, TILES, COLUMNS>(a[tile], stage, tile, at);
#pragma unroll
    for (int half = 0; half < 2; half++) scale[tile][half] = scales[at * 16 * TILES + 16 * tile + 8 * half + lane / 4];
  }
  const uint2* q = reinterpret_cast<const uint2*>(x.q) + int64_t(group) * x.tokens * 4;
  const uint2* meta = reinterpret_cast<const uint2*>(x.meta) + int64_t(group) * x.tokens;
#pragma unroll
  for (int column = 0; column < COLUMNS; column++) {
    const int token = first_token + 8 * column;
    const uint2 b = token + lane / 4 < x.tokens ? __ldg(q + (token + lane / 4) * 4 + t) : make_uint2(0, 0);
    Meta of[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint2 m = token + 2 * t + i < x.tokens ? __ldg(meta + token + 2 * t + i) : make_uint2(0, 0);
      of[i] = Meta{__uint_as_float(m.x), m.y};
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int dots[4] = {0, 0, 0, 0}, others[4] = {0, 0, 0, 0};
      if constexpr (F::kTwo) {
        ptx::mma_k16(dots, a[tile][0], a[tile][1], b.x);
        ptx::mma_k16(others, a[tile][2], a[tile][3], b.y);
      } else {
        ptx::mma_k32(dots, a[tile], b.x, b.y);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) add_group<F>(sums[tile][column][i], scale[tile][i / 2], of[i % 2], dots[i], others[i]);
    }
  }
}

// Sums of the eight warps, in the order of `add_group`; the first warp has the result.
template <int TILES, int COLUMNS>
__device__ __forceinline__ void reduce_warps(float (&sums)[TILES][COLUMNS][4], float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int width = kWarps / 2; width; width /= 2) {
    __syncthreads();
    float* mine = shared + (warp % width) * TILES * COLUMNS * 4 * 32 + lane;
#pragma unroll
    for (int i = 0; i < TILES * COLUMNS * 4; i++)
      if (warp >= width && warp < 2 * width) mine[i * 32] = sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILES * COLUMNS * 4; i++)
      if (warp < width) sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] += mine[i * 32];
  }
}

// grid: x the blocks of rows; y the blocks of tokens.
template <class F, int TILES, int COLUMNS>
__global__ void __launch_bounds__(kMmaThreads, COLUMNS < (F::kTwo ? 4 : 8) ? 2 : 1) mma_kernel(const LinearArgs args) {
  using S = MmaShape<F, TILES, COLUMNS>;
  CUDA_SHARED(shared);
  GroupScale* scales = reinterpret_cast<GroupScale*>(shared + S::kStages * S::kStage);
  const int first_row = blockIdx.x * S::kRows, first_token = blockIdx.y * S::kTokens, groups = args.groups;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = (groups + kStep16 - 1) / kStep16;
  const auto stage = [&](int step) { return shared + step % S::kStages * S::kStage; };
  const auto copy = [&](int step) {
    copy_step<F, TILES, COLUMNS>(stage(step), args.planes, first_row, args.rows, groups, step);
    ptx::copy_commit();  // also of nothing: groups of copies are counted
  };

  float sums[TILES][COLUMNS][4] = {};
  for (int step = 0; step < S::kStages - 1; step++) copy(step);
  StepScales<F, TILES> ahead;
  ahead.load(args.planes, first_row, args.rows, groups, 0);
  ahead.store(scales, groups, 0);
  for (int step = 0; step < steps; step++) {
    ptx::copy_wait<S::kStages - 2>();
    __syncthreads();  // this step's codes and scales are there, and nobody reads those of the step before
    copy(step + S::kStages - 1);
    if (step + 1 < steps) ahead.load(args.planes, first_row, args.rows, groups, step + 1);
    for (int u = 0; u < 2; u++) {
      const int at = 2 * warp + u, group = step * kStep16 + at;
      if (group >= groups) break;
      mma_group<F, TILES, COLUMNS>(sums, stage(step), scales + step % 2 * kStep16 * S::kRows, args.x, first_token, group, at);
    }
    if (step + 1 < steps) ahead.store(scales + (step + 1) % 2 * kStep16 * S::kRows, groups, step + 1);
  }
  ptx::copy_wait<0>();
  reduce_warps<TILES, COLUMNS>(sums, reinterpret_cast<float*>(shared));
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < TILES * COLUMNS * 4; i++) {
    const int row = first_row + i / 4 / COLUMNS * 16 + i % 4 / 2 * 8 + lane / 4;
    const int token = first_token + i / 4 % COLUMNS * 8 + 2 * (lane % 4) + i % 2;
    if (row < args.rows && token < args.x.tokens) finish(args, token, row, sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4]);
  }
}

}  // namespace ollamapy::cuda
