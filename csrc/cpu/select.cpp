// Which instruction set's kernels are in force. Compiled once, for any CPU of the architecture.
#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

#ifndef OLLAMAPY_ISAS
#error "compiled with -DOLLAMAPY_ISAS(X)=X(<instruction set>) ...: those that the library holds, best first"
#endif

namespace ollamapy {

#define X(isa) namespace isa { extern const Kernels kernels; }
OLLAMAPY_ISAS(X)
#undef X

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

[[maybe_unused]] bool has_base() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool has_f16c() {  // __builtin_cpu_supports knows the name from GCC 11 and Clang 16 on
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2");
}

[[maybe_unused]] bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

[[maybe_unused]] bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

#define X(isa) {&isa::kernels, has_##isa},
const Candidate kCandidates[] = {OLLAMAPY_ISAS(X)};
#undef X

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) return candidate.kernels;
  }
  return nullptr;  // built for another CPU
}

std::atomic<const Kernels*>& in_force() {
  static std::atomic<const Kernels*> chosen = best();
  return chosen;
}

std::string cpu_isas() {
  std::string names;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.runs_here()) continue;
    if (!names.empty()) names += ' ';
    names += candidate.kernels->isa;
  }
  return names;
}

std::string cpu_isa(std::string force) {
  if (!force.empty()) {
    const Kernels* found = nullptr;
    for (const Candidate& candidate : kCandidates) {
      if (force == candidate.kernels->isa && candidate.runs_here()) found = candidate.kernels;
    }
    STD_TORCH_CHECK(found, "cpu_isa: cannot run '", force, "' here (what was built and runs: ", cpu_isas(), ")");
    in_force() = found;
  }
  return kernels().isa;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = in_force();
  STD_TORCH_CHECK(chosen, "this CPU runs none of the instruction sets that the kernels were built for");
  return *chosen;
}

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace ollamapy
