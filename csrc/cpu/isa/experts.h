// Routing of tokens to experts, and the order in which a batch runs through them: sorted by expert, so that each expert in use is
// read once. A token's experts keep their order, likeliest first; its answer is their sum in that order.
#pragma once
#include "../decoder.h"
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// The `used` largest of logits (n,), the lower index first among equals, and their weights. Always picks valid experts, of NaN too.
INLINE void route(const float* logits, int n, const Routing& r, int32_t* ids, float* weights) {
  uint64_t taken[kMaxExperts / 64] = {};
  for (int place = 0; place < r.used; place++) {
    int best = -1;
    for (int e = 0; e < n; e++)
      if (!(taken[e / 64] >> (e % 64) & 1) && (best < 0 || logits[e] > logits[best])) best = e;
    taken[best / 64] |= uint64_t(1) << (best % 64);
    ids[place] = best;
  }
  const float top = logits[ids[0]];
  alignas(64) float part[16];
  float sum = 0.0f;
  for (int place = 0; place < r.used; place += 16) {
    for (int i = 0; i < 16; i++) part[i] = place + i < r.used ? logits[ids[place + i]] : top;
    const F x = load(part);
    if (r.gating == kGatingSigmoid) store(part, div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0.0f), x)))));
    else store(part, exp(sub(x, splat(top))));
    for (int i = 0; i < 16 && place + i < r.used; i++) {
      weights[place + i] = part[i];
      sum += part[i];
    }
  }
  float all = 1.0f;  // what a score is divided by to be a probability
  if (r.gating == kGatingSoftmax) {
    F total = splat(0.0f);
    for (int e = 0; e < n; e += 16) total = add(total, keep_lanes(exp(sub(load(logits + e), splat(top))), 0, n - e, 0.0f));
    all = reduce_add(total);
  }
  if (r.renormalize || r.gating == kGatingSelected) {
    const float chosen = sum / all;
    all = r.gating == kGatingSelected ? sum : all * (chosen > 0x1p-14f ? chosen : 0x1p-14f);
  }
  for (int place = 0; place < r.used; place++) weights[place] = weights[place] / all * r.scale;
}

// Entries (token, place) sorted by expert, tokens ascending within one.
INLINE void sort_entries(const int32_t* ids, int64_t tokens, int used, int experts, const Entries& e) {
  for (int x = 0; x <= experts; x++) e.start[x] = 0;
  for (int64_t i = 0; i < tokens * used; i++) e.start[ids[i] + 1]++;
  for (int x = 0; x < experts; x++) e.start[x + 1] += e.start[x];
  for (int64_t i = 0; i < tokens * used; i++) {
    const int32_t at = e.start[ids[i]]++;
    e.slot[i] = at;
    e.token[at] = int32_t(i / used);
    e.expert[at] = ids[i];
  }
  for (int x = experts; x > 0; x--) e.start[x] = e.start[x - 1];
  e.start[0] = 0;
}

}  // namespace
}  // namespace ollamapy::OLLAMAPY_ISA
