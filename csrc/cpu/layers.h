// The decoder layers that live in this process, by handle.
#pragma once
#include <vector>

#include "../common/check.h"
#include "decoder.h"

namespace ollamapy {

constexpr int kMaxPlanes = 3;

void check_shape(const char* op, const AttentionShape& a);

// The layers of these handles, all of one hidden length, which is set. A layer lives until `layer_free`.
std::vector<const Layer*> find_layers(const std::vector<int64_t>& handles, int64_t& length);

}  // namespace ollamapy
