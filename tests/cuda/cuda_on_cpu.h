// Runs the kernels of csrc/cuda on the CPU, for correctness alone: what a C++20 compiler needs in place of CUDA's headers.
//
// One block at a time; each thread of a block is a fiber (a stack of its own, switched by hand), so `__shared__` is `static`.
// Barriers and warp operations are rendezvous: a fiber waits there until all that must come have come; if they cannot, the
// program dies and says where. Each warp runs as far as it can before the next one starts: the greatest skew there is, which shows
// missing barriers. cuda_on_cpu_schedule chooses which warp and lane comes first (0: the first, 1: the last), and whether
// asynchronous copies land at once (a missing barrier before the copy shows) or as late as their wait allows (a missing or wrong
// wait shows). Not seen here: races within a warp's step, memory order, time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict

using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace on_cpu {

// Saves the registers that a callee must keep, and changes stacks (x86-64, System V).
extern "C" void on_cpu_switch(void** save, void* to);
asm(R"(.text
.weak on_cpu_switch
on_cpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret
)");

enum class State : uint8_t { kReady, kBarrier, kWarp, kDone };
struct Copy {
  void* to;
  const void* from;
  int bytes, age;
};
struct Fiber {
  std::vector<Copy> copies;
  void* stack_pointer = nullptr;
  State state = State::kReady;
  uint32_t mask = 0;
  const void* site = nullptr;
  uint64_t value = 0;
  dim3 thread;
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::function<void()>* body = nullptr;
  void* scheduler = nullptr;
  int current = 0, alive = 0, order = 0, eager = 0;
  dim3 index, size, grid;
  uint64_t published[1024];
  uint32_t fragments[1024][8];
};
inline Block block;
constexpr size_t kStack = 96 << 10;

inline Fiber& self() { return block.fibers[block.current]; }
inline void leave() { on_cpu_switch(&self().stack_pointer, block.scheduler); }
inline void run_fiber() {
  (*block.body)();
  if (!self().copies.empty()) {
    fprintf(stderr, "cuda_on_cpu: thread %d ends with copies that nobody waited for\n", block.current);
    abort();
  }
  self().state = State::kDone;
  block.alive--;
  leave();
}
#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#else
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif
inline void start_fiber(int i) {
  Fiber& fiber = block.fibers[i];
  __asan_unpoison_memory_region(block.stacks[i].get(), kStack);  // the last fiber there left without returning
  fiber.thread = dim3(i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y));
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(block.stacks[i].get()) + kStack) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int k = 0; k < 6; k++) *--top = nullptr;
  fiber.stack_pointer = top;
}
// Lets the lanes [begin, end) go on that wait together at one place, if all of their mask that still run are there.
inline bool meet(int begin, int end) {
  bool met = false;
  for (int i = begin; i < end; i++) {
    if (block.fibers[i].state != State::kWarp) continue;
    const uint32_t mask = block.fibers[i].mask;
    const void* site = block.fibers[i].site;
    uint32_t here = 0, gone = 0;
    for (int j = begin; j < begin + 32; j++) {
      const bool real = j < end;
      if (real && block.fibers[j].state == State::kWarp && block.fibers[j].mask == mask && block.fibers[j].site == site)
        here |= 1u << (j - begin);
      if (!real || block.fibers[j].state == State::kDone) gone |= 1u << (j - begin);
    }
    if ((here | (gone & mask)) != mask) continue;
    for (int j = begin; j < end; j++)
      if (here >> (j - begin) & 1) {
        block.published[j] = block.fibers[j].value;
        block.fibers[j].state = State::kReady;
      }
    met = true;
  }
  return met;
}
inline void run_block(std::function<void()>& body) {
  const int count = block.size.x * block.size.y * block.size.z, warps = (count + 31) / 32;
  block.fibers.assign(count, {});
  block.alive = count;
  block.body = &body;
  while (int(block.stacks.size()) < count) block.stacks.emplace_back(new char[kStack]);
  for (int i = 0; i < count; i++) start_fiber(i);
  while (block.alive) {
    bool any = false;
    for (int k = 0; k < warps; k++) {
      const int begin = (block.order ? warps - 1 - k : k) * 32, end = std::min(count, begin + 32);
      for (bool progress = true; progress;) {
        progress = false;
        for (int l = begin; l < end; l++) {
          const int i = block.order ? begin + end - 1 - l : l;
          if (block.fibers[i].state != State::kReady) continue;
          block.current = i;
          progress = any = true;
          on_cpu_switch(&block.scheduler, block.fibers[i].stack_pointer);
        }
        if (meet(begin, end)) progress = any = true;
      }
    }
    int waiting = 0;
    for (const Fiber& fiber : block.fibers) waiting += fiber.state == State::kBarrier;
    if (waiting && waiting == block.alive) {
      for (Fiber& fiber : block.fibers)
        if (fiber.state == State::kBarrier) fiber.state = State::kReady;
      any = true;
    }
    if (!any && block.alive) {
      fprintf(stderr, "cuda_on_cpu: block (%u, %u): threads wait for others that cannot come\n", block.index.x, block.index.y);
      abort();
    }
  }
}
inline int failed = 0;
template <class Body>
inline void launch(dim3 grid, dim3 size, size_t shared, Body&& body) {
  failed = grid.y > 65535 ? 9 : 0;  // cudaErrorInvalidConfiguration: only x has room for more
  if (failed) return;
  std::function<void()> call = body;
  block.grid = grid, block.size = size;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      block.shared.assign(shared + 128, char(0xCD));
      block.index = dim3(x, y, 0);
      run_block(call);
    }
}
// The value of lane `source` of the warp, once all lanes of `mask` have come here.
inline uint64_t exchange(uint32_t mask, uint64_t value, int source, const void* site) {
  const int i = block.current;
  if (!(mask >> (i & 31) & 1)) abort();
  self().mask = mask, self().site = site, self().value = value, self().state = State::kWarp;
  leave();
  return block.published[(i & ~31) + (source & 31)];
}
// The fragments of a warp's lanes, side by side while `compute` (warp's first thread, lane) runs.
template <class Compute>
inline void together(const uint32_t* words, int count, const void* site, Compute&& compute) {
  memcpy(block.fragments[block.current], words, 4 * count);
  exchange(~0u, 0, 0, site);
  compute(block.current & ~31, block.current & 31);
  exchange(~0u, 0, 0, static_cast<const char*>(site) + 1);
}
inline int byte_of(uint32_t word, int i) { return int8_t(word >> 8 * i); }

}  // namespace on_cpu

extern "C" __attribute__((weak, visibility("default"))) void cuda_on_cpu_schedule(int order, int eager) {
  on_cpu::block.order = order, on_cpu::block.eager = eager;
}

#define threadIdx (on_cpu::self().thread)
#define blockIdx (on_cpu::block.index)
#define ON_CPU_SITE __builtin_return_address(0)
#define CUDA_LAUNCH(kernel, grid, size, shared, stream, ...) ((void)(stream), on_cpu::launch(grid, size, shared, [=] { kernel(__VA_ARGS__); }))
#define CUDA_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(on_cpu::block.shared.data()) + 127) & ~uintptr_t(127))

template <class Kernel>
inline void cudaFuncSetAttribute(Kernel, int, int) {}
inline int cudaGetLastError() { return on_cpu::failed; }

__attribute__((noinline)) inline void __syncthreads() {
  on_cpu::self().state = on_cpu::State::kBarrier;
  on_cpu::leave();
}
__attribute__((noinline)) inline void __syncwarp(uint32_t mask = ~0u) { on_cpu::exchange(mask, 0, 0, ON_CPU_SITE); }
template <class T>
__attribute__((noinline)) T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  static_assert(sizeof(T) == 4);
  uint64_t bits = 0;
  memcpy(&bits, &value, 4);
  bits = on_cpu::exchange(mask, bits, (on_cpu::block.current & 31) ^ lanes, ON_CPU_SITE);
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += on_cpu::byte_of(uint32_t(a), i) * on_cpu::byte_of(uint32_t(b), i);
  return c;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

namespace ptx {

__attribute__((noinline)) inline void mma_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  on_cpu::together(mine, 6, ON_CPU_SITE, [&](int warp, int lane) {
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 32; k++) {
        const uint32_t* row = on_cpu::block.fragments[warp + lane / 4 * 4 + k % 16 / 4];
        const uint32_t* column = on_cpu::block.fragments[warp + (lane % 4 * 2 + i % 2) * 4 + k % 16 / 4];
        c[i] += on_cpu::byte_of(row[i / 2 + k / 16 * 2], k % 4) * on_cpu::byte_of(column[4 + k / 16], k % 4);
      }
  });
}
__attribute__((noinline)) inline void mma_k16(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t mine[3] = {a0, a1, b};
  on_cpu::together(mine, 3, ON_CPU_SITE, [&](int warp, int lane) {
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 16; k++) {
        const uint32_t* row = on_cpu::block.fragments[warp + lane / 4 * 4 + k / 4];
        const uint32_t* column = on_cpu::block.fragments[warp + (lane % 4 * 2 + i % 2) * 4 + k / 4];
        c[i] += on_cpu::byte_of(row[i / 2], k % 4) * on_cpu::byte_of(column[2], k % 4);
      }
  });
}
template <int BYTES>
inline void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) {
    fprintf(stderr, "cuda_on_cpu: an asynchronous copy of %d bytes at an odd address\n", BYTES);
    abort();
  }
  if (on_cpu::block.eager) memcpy(to, from, BYTES);
  else on_cpu::self().copies.push_back({to, from, BYTES, 0});
}
inline void copy_commit() {
  for (on_cpu::Copy& copy : on_cpu::self().copies) copy.age++;
}
template <int PENDING>
inline void copy_wait() {
  std::vector<on_cpu::Copy>& copies = on_cpu::self().copies;
  size_t left = 0;
  for (const on_cpu::Copy& copy : copies)
    if (copy.age > PENDING) memcpy(copy.to, copy.from, copy.bytes);
    else copies[left++] = copy;
  copies.resize(left);
}
inline uint4 load_once(const uint4* p) { return *p; }

inline float from_half(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16_t to_half(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t to_bfloat(float x) {
  const uint32_t bits = __float_as_uint(x);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace ptx
