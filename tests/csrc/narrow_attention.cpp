// Attention by fewer threads than the batch was cut into spans for: the results of one thread, and no byte beyond the room that two
// layers of different heads share. Built with the address sanitizer, beside csrc/cpu/isa/decoder.cpp.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/isa/families.h"
#include "../../csrc/cpu/team.h"

using namespace ollamapy;

namespace {

constexpr int kTokens = 1100, kBlocks = (kTokens + 15) / 16;

std::vector<float> numbers(size_t count) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> any(-1.0f, 1.0f);
  std::vector<float> made(count);
  for (float& x : made) x = any(random);
  return made;
}

std::vector<float> attend(const AttentionShape& a, int64_t room, const Tokens& t, int threads, int count) {
  std::vector<float> q = numbers(size_t(a.heads * a.key_length));
  std::vector<float> keys = numbers(size_t(kBlocks * 16 * a.kv_heads * a.key_length)), values = numbers(size_t(kBlocks * 16 * a.kv_heads * a.value_length));
  const Cache cache = {reinterpret_cast<uint8_t*>(keys.data()), reinterpret_cast<uint8_t*>(values.data()), kCacheF32};
  std::vector<float> partials(static_cast<size_t>(room)), y(size_t(a.heads * a.value_length));
  int64_t next = 0;
  AttentionRun run{&a, &t, &cache, nullptr, q.data(), y.data(), a.heads * a.key_length, a.heads * a.value_length, room ? partials.data() : nullptr, threads, &next};
  team::run(count, [](void* argument, int index, int all) { OLLAMAPY_ISA::run_attention(*static_cast<AttentionRun*>(argument), index, all); }, &run);
  return y;
}

}  // namespace

int main() {
  std::vector<int32_t> table(kBlocks);
  for (int b = 0; b < kBlocks; b++) table[size_t(b)] = b;
  const int32_t start[] = {0, 1}, length[] = {kTokens};
  const AttendItem item = {0, 0, 1, 0};
  Tokens t{};
  t.num_tokens = t.num_seqs = t.num_items = t.most_rows = 1;
  t.max_blocks = kBlocks;
  t.most_chunks = t.pairs = (kTokens + kChunk - 1) / kChunk;
  t.block_table = table.data();
  t.query_start = start;
  t.seq_lens = length;
  t.items = &item;
  const AttentionShape wide = {8, 4, 64, 64, 0.1f, 0.0f, 0, true}, narrow = {1, 1, 16, 16, 0.1f, 0.0f, 0, true};
  for (int threads = 1; threads <= 6; threads++) {
    const int64_t room = std::max(partial_floats(t, wide, threads), partial_floats(t, narrow, threads));
    for (int count = 1; count <= threads; count++)
      for (const AttentionShape* a : {&wide, &narrow})
        if (attend(*a, room, t, threads, count) != attend(*a, 0, t, 1, 1)) {
          std::printf("%d of %d threads, %d heads: another answer\n", count, threads, a->heads);
          return 1;
        }
  }
}
