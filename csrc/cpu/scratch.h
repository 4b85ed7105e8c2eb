// Buffers of the calling thread that grow and stay: an allocation per op would cost more than most ops here.
#pragma once
#include <cstdint>

namespace ollamapy {

struct Scratch {
  enum Use { kActs, kGathered, kOut, kQkv, kAttn, kFfn, kLogits, kRows, kEntries, kJobs, kPartials, kUses };
  static uint8_t* bytes(Use use, int64_t size);  // aligned to 64; contents are not kept
  static float* floats(Use use, int64_t count) { return reinterpret_cast<float*>(bytes(use, count * 4)); }
};

}  // namespace ollamapy
