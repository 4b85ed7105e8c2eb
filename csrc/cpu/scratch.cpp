#include "scratch.h"

#include <cstdlib>
#include <new>

namespace ollamapy {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[Scratch::kUses];

}  // namespace

uint8_t* Scratch::bytes(Use use, int64_t size) {
  Buffer& b = buffers[use];
  if (b.size < size) {
    std::free(b.data);
    b.size = 0;
    b.data = std::aligned_alloc(64, (size + 4095) / 4096 * 4096);
    if (!b.data) throw std::bad_alloc();
    b.size = size;
  }
  return static_cast<uint8_t*>(b.data);
}

}  // namespace ollamapy
