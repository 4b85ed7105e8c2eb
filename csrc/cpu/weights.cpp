// Memory for packed weights: regions that weights are cut from one behind the other, so that all but the ends of a region lie on
// 2 MB pages. With an allocation of its own each, a quarter of a 1B model's bytes lay on 4 KB pages, which are read 8 % slower.
#include "weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>

#include <torch/csrc/stable/ops.h>

namespace ollamapy {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPage = 2 << 20, kRegion = 256 << 20;  // pages of a region that nothing is written to take no memory
constexpr int64_t kSmall = 64 << 10;  // an allocation of its own: what reads beyond it, the address sanitizer sees

struct Region {
  int64_t size, used = 0;
  void* mapped;
  uint8_t* begin;  // of the first whole page

  explicit Region(int64_t bytes) : size((bytes + kPage - 1) / kPage * kPage) {
    mapped = mmap(nullptr, size_t(size + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapped) + kPage - 1) / kPage * kPage);
    madvise(begin, size_t(size), MADV_HUGEPAGE);
  }
  Region(const Region&) = delete;
  ~Region() { munmap(mapped, size_t(size + kPage)); }
};

std::mutex one_caller;
std::weak_ptr<Region> current;  // the weights in it keep it

}  // namespace

Tensor weight_memory(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t size = 1;
  for (size_t i = shape.size(); i-- > 0; size *= shape[i]) strides[i] = size;
  if (size < kSmall) return torch::stable::empty(shape, ScalarType::Byte);
  std::lock_guard<std::mutex> only(one_caller);
  std::shared_ptr<Region> region = current.lock();
  if (!region || region->size - region->used < size) {
    region = std::make_shared<Region>(size > kRegion ? size : kRegion);
    current = region;
  }
  uint8_t* at = region->begin + region->used;
  region->used = std::min(region->size, region->used + (size + 63) / 64 * 64);
  return torch::stable::from_blob(at, shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                  [region](void*) {});
}

}  // namespace ollamapy
