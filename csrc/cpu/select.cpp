// Which instruction set's kernels are in force. Compiled once, for any CPU of the architecture.
#include <atomic>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace ollamapy {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Candidate kCandidates[] = {  // best first
#if defined(__x86_64__)
    {&avx512bf16::kernels, has_avx512bf16},
    {&avx512vnni::kernels, has_avx512vnni},
    {&avx2::kernels, has_avx2},
#endif
    {&base::kernels, [] { return true; }},
};

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) return candidate.kernels;
  }
  return &base::kernels;
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
    STD_TORCH_CHECK(found, "cpu_isa: this CPU cannot run '", force, "' (it can run: ", cpu_isas(), ")");
    in_force() = found;
  }
  return kernels().isa;
}

}  // namespace

const Kernels& kernels() { return *in_force(); }

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace ollamapy
