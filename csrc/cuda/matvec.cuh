// Few tokens: integer dots with dp4a. Eight lanes share a row of the matrix; a lane's partial sum is that of `add_group`.
//
// What keeps the memory busy: codes come by 16 bytes and past L1, and the next codes are asked for before the present ones are used:
// two sets of UNROLL * 32 bytes a lane (4-bit types) are 32 KB in flight on an H100 whose SMs have a block or two. Activations are
// read through L1, where all rows of a block find them: staging them in shared memory would cost a barrier ahead of the first dot
// and gain nothing, an L1 hit being as quick.
#pragma once
#include "forms.cuh"

namespace ollamapy::cuda {

constexpr int kMatvecThreads = 128, kRowLanes = kMatvecThreads / 8;

// A pair of groups of one row: codes and scales.
template <class F>
struct PairCodes {
  uint32_t low[2][F::kLow == 2 ? 2 : F::kLow];
  uint32_t high[2][F::kHigh == 0 ? 1 : F::kHigh];
  RawScales scales;
};

template <class F>
__device__ __forceinline__ void load_pair(PairCodes<F>& to, const Planes& planes, int64_t row, int pair, int groups) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    const int64_t at = row * groups + min(2 * pair + u, groups - 1);
    if constexpr (F::kLow == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(planes.low) + at);
      to.low[u][0] = v.x, to.low[u][1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < F::kLow / 4; i++) {
        const uint4* from = reinterpret_cast<const uint4*>(planes.low + at * F::kLowBytes) + i;
        const uint4 v = F::kLow == 4 ? ptx::load_once(from) : __ldg(from);  // 32 bytes a group: L1 keeps the other half of a sector
        to.low[u][4 * i] = v.x, to.low[u][4 * i + 1] = v.y, to.low[u][4 * i + 2] = v.z, to.low[u][4 * i + 3] = v.w;
      }
    }
    if constexpr (F::kHigh == 1) to.high[u][0] = load32(planes.high + at * 4);
    if constexpr (F::kHigh == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(planes.high) + at);
      to.high[u][0] = v.x, to.high[u][1] = v.y;
    }
  }
  to.scales = load_scales<F>(planes, row, pair, groups);
}

// The dots of one pair of groups with every token. sums: [token].
template <class F, int TOKENS>
__device__ __forceinline__ void add_pair(float (&sums)[TOKENS], const PairCodes<F>& codes, const Activations& x, int pair, int groups) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    const int g = 2 * pair + u;
    if (g >= groups) return;
    uint32_t first[4], second[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t low0 = F::kLow == 2 ? codes.low[u][0] : codes.low[u][t];
      const uint32_t low1 = F::kLow == 2 ? codes.low[u][1] : codes.low[u][F::kLow == 8 ? 4 + t : 0];
      unpack<F>(low0, low1, codes.high[u][0], codes.high[u][F::kHigh == 2 ? 1 : 0], t, first[t], second[t]);
    }
    const GroupScale scale = decode_scale<F>(codes.scales, u);
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const int64_t at = TOKENS == 1 ? g : int64_t(g) * x.tokens + min(token, x.tokens - 1);
      const uint4* q = reinterpret_cast<const uint4*>(x.q + at * 32);
      const uint4 near = __ldg(q), far = __ldg(q + 1);  // words 0 4 1 5, 2 6 3 7
      int dot0 = __dp4a(int(first[0]), int(near.x), 0), dot1 = __dp4a(int(second[0]), int(near.y), 0);
      dot0 = __dp4a(int(first[1]), int(near.z), dot0), dot1 = __dp4a(int(second[1]), int(near.w), dot1);
      dot0 = __dp4a(int(first[2]), int(far.x), dot0), dot1 = __dp4a(int(second[2]), int(far.y), dot1);
      dot0 = __dp4a(int(first[3]), int(far.z), dot0), dot1 = __dp4a(int(second[3]), int(far.w), dot1);
      const uint2 meta = __ldg(reinterpret_cast<const uint2*>(x.meta) + at);
      add_group<F>(sums[token], scale, Meta{__uint_as_float(meta.x), meta.y}, F::kTwo ? dot0 : dot0 + dot1, dot1);
    }
  }
}

// TOKENS >= x.tokens; ROWS rows for each eight lanes, kRowLanes apart. grid: blocks of rows.
template <class F, int TOKENS, int ROWS, int UNROLL>
__global__ void __launch_bounds__(kMatvecThreads, 1) matvec_kernel(const LinearArgs args) {
  const int lane = threadIdx.x % 8, first_row = blockIdx.x * kRowLanes * ROWS + threadIdx.x / 8;
  const int groups = args.groups, pairs = (groups + 1) / 2;
  const auto near = [&](int pair) { return min(pair, pairs - 1); };

  PairCodes<F> codes[2][UNROLL][ROWS];
  float sums[ROWS][TOKENS] = {};
  const auto load = [&](PairCodes<F>(&to)[UNROLL][ROWS], int pair) {
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        load_pair<F>(to[i][r], args.planes, min(first_row + kRowLanes * r, args.rows - 1), near(pair + 8 * i), groups);
  };
  const auto add = [&](const PairCodes<F>(&from)[UNROLL][ROWS], int pair) {
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (pair + 8 * i < pairs)
#pragma unroll
        for (int r = 0; r < ROWS; r++) add_pair<F, TOKENS>(sums[r], from[i][r], args.x, pair + 8 * i, groups);
  };
  load(codes[0], lane);
  for (int pair = lane; pair < pairs; pair += 16 * UNROLL) {
    load(codes[1], pair + 8 * UNROLL);
    add(codes[0], pair);
    load(codes[0], pair + 16 * UNROLL);
    add(codes[1], pair + 8 * UNROLL);
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      float sum = sums[r][token];
      sum += __shfl_xor_sync(~0u, sum, 4);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum += __shfl_xor_sync(~0u, sum, 1);
      const int row = first_row + kRowLanes * r;
      if (lane == token % 8 && row < args.rows && token < args.x.tokens) finish(args, token, row, sum);
    }
}

}  // namespace ollamapy::cuda
