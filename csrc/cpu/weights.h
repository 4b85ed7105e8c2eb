// Memory for packed weights.
#pragma once
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace ollamapy {

// uint8 of a shape, not initialised. Those of a model lie side by side on 2 MB pages.
torch::stable::Tensor weight_memory(const std::vector<int64_t>& shape);

}  // namespace ollamapy
