#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <exception>
#include <mutex>
#include <utility>

#include "width.h"

namespace ollamapy::team {
namespace {

constexpr int kBarrierSpins = 2000;  // about 20 us: longer than any honest wait between even shares
constexpr int kIdleSpins = 4000;     // about 40 us: the gap between the operations of one step
constexpr int kIdleYields = 400;     // then about 400 us, the gap between steps, in which whoever else wants the core gets it
constexpr int kSpinsPerYield = 100;
constexpr int kPieces = 8;  // of a thread's share

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
constexpr uint32_t kAll = ~0u;  // sleepers have a bit each, or several share one
void sleep_while(std::atomic<uint32_t>& word, uint32_t value, uint32_t bit) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_BITSET_PRIVATE, value, nullptr, nullptr, bit);
}
void wake(std::atomic<uint32_t>& word, uint32_t bits) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, nullptr, nullptr, bits);
}
int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

// A number that changes; waiters sleep on it, and the one who changes it wakes them only if somebody sleeps.
struct alignas(64) Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};
  void raise() { become(value.load() + 1, kAll); }
  void become(uint32_t next, uint32_t bits) {
    value.store(next);
    if (sleepers.load()) wake(value, bits);
  }
  bool spin(uint32_t seen, int spins) {
    for (int i = 0; i < spins; i++) {
      if (value.load(std::memory_order_acquire) != seen) return true;
      pause();
    }
    return false;
  }
  void wait_beyond(uint32_t seen, int spins, int yields = 0, uint32_t bit = kAll) {
    if (spin(seen, spins)) return;
    for (int i = 0; i < yields; i++) {
      sched_yield();
      if (spin(seen, kSpinsPerYield)) return;
    }
    sleepers.fetch_add(1);
    while (value.load() == seen) sleep_while(value, seen, bit);
    sleepers.fetch_sub(1);
  }
  // Nanoseconds beyond a wait that even shares explain.
  int64_t stall_beyond(uint32_t seen) {
    if (spin(seen, kBarrierSpins)) return 0;
    const int64_t begin = nanoseconds();
    wait_beyond(seen, 0);
    return nanoseconds() - begin;
  }
};

Part parts[kMaxThreads];
thread_local int self = 0;  // a helper's number; the caller of a run is 0

std::atomic<int> team_size{1};
Width width;
Signal start;  // low bits: the threads of the run that starts, 0 when helpers are to end
constexpr uint32_t kCounts = 512;
Signal arrived, done;
alignas(64) std::atomic<int> waiting{0};
alignas(64) std::atomic<int> finished{0};
Work current_work;
void* current_argument;
std::atomic<bool> failed{false};
std::exception_ptr failure;  // of the first who failed
int started = 1;
std::mutex one_caller;

struct alignas(64) Cursor {
  std::atomic<int> taken{0};
};
Cursor cursors[2][kMaxThreads];  // of even and odd turns: pieces that were taken of each thread's share

// An exception waits until nobody uses the argument any more, which may lie in the caller's frame.
void do_part(int thread, int count) {
  try {
    current_work(current_argument, thread, count);
  } catch (...) {
    if (!failed.exchange(true)) failure = std::current_exception();
  }
}

struct Birth {
  int thread;
  uint32_t seen;  // the runs before this helper was there are none of its business
};

uint32_t bit_of(int thread) { return 1u << std::min(thread, 31); }
uint32_t bits_below(int count) { return count < 32 ? (1u << count) - 1 : kAll; }
void start_run(uint32_t count, uint32_t bits) {
  finished.store(0);
  start.become((start.value.load() / kCounts + 1) * kCounts + count, bits);
}

void* helper(void* argument) {
  const auto [thread, born] = *static_cast<Birth*>(argument);
  delete static_cast<Birth*>(argument);
  self = thread;
  for (uint32_t seen = born;;) {
    if (width.leaves_out(thread)) start.wait_beyond(seen, 0, 0, bit_of(thread));
    else start.wait_beyond(seen, kIdleSpins, kIdleYields, bit_of(thread));
    seen = start.value.load();
    const int count = int(seen % kCounts);
    if (count == 0) {
      const int helpers = started - 1;
      if (finished.fetch_add(1) + 1 == helpers) done.raise();
      return nullptr;
    }
    if (thread >= count) continue;
    do_part(thread, count);
    if (finished.fetch_add(1) + 1 == count - 1) done.raise();
  }
}

// A helper more. Helpers must take no signals: Python's handlers belong to the main thread.
bool start_helper() {
  static const int forked = pthread_atfork(nullptr, nullptr, [] { started = 1; });  // threads do not follow into a child
  auto* birth = new Birth{started, start.value.load()};
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t id;
  const int error = forked ? forked : pthread_create(&id, nullptr, helper, birth);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error) {
    delete birth;
    return false;
  }
  pthread_detach(id);
  started += 1;
  return true;
}
}  // namespace

void set_size(int threads) {
  std::lock_guard<std::mutex> only(one_caller);
  team_size = threads < kMaxThreads ? threads : kMaxThreads;
  width.reset();
  if (started == 1) return;
  const uint32_t seen = done.value.load();
  start_run(0, kAll);
  done.wait_beyond(seen, kBarrierSpins);
  started = 1;
}
int size() { return team_size; }

void barrier(int count) {
  const uint32_t seen = arrived.value.load();
  if (waiting.fetch_add(1) + 1 == count) {
    waiting.store(0);
    arrived.raise();
  } else {
    const int64_t stalled = arrived.stall_beyond(seen);
    if (stalled) parts[self].waited += stalled;
  }
}

// Nobody uses the cursors of the turn after this one: all left the turn before this one at a barrier.
Pieces::Pieces(int64_t n, int thread, int count, int turn) : n_(n), count_(count), turn_(turn & 1), at_(thread), left_(count - 1) {
  if (count > 1) cursors[turn_ ^ 1][thread].taken.store(0, std::memory_order_relaxed);
}

bool Pieces::next(int64_t& begin, int64_t& end) {
  if (count_ == 1) {
    begin = 0;
    end = n_;
    n_ = 0;
    return begin < end;
  }
  for (;;) {
    const int64_t piece = cursors[turn_][at_].taken.fetch_add(1, std::memory_order_relaxed);
    if (piece >= kPieces) {
      if (left_-- == 0) return false;
      at_ = at_ + 1 == count_ ? 0 : at_ + 1;
      continue;
    }
    const int64_t place = at_ * kPieces + piece, places = int64_t(count_) * kPieces;
    begin = n_ * place / places;
    end = n_ * (place + 1) / places;
    if (begin == end) continue;
    parts[self].items += end - begin;
    return true;
  }
}

void run(int count, Work work, void* argument) {
  if (count > kMaxThreads) count = kMaxThreads;
  if (count <= 1) return work(argument, 0, 1);
  std::lock_guard<std::mutex> only(one_caller);
  const int wanted = count;
  const int64_t begin = nanoseconds();
  count = width.of(count, begin);
  while (started < count)
    if (!start_helper()) count = started;
  if (count == 1) return work(argument, 0, 1);
  current_work = work;
  current_argument = argument;
  for (int i = 0; i < count; i++) {
    cursors[0][i].taken.store(0, std::memory_order_relaxed);
    parts[i] = {};
  }
  const uint32_t seen = done.value.load();
  start_run(uint32_t(count), bits_below(count));
  do_part(0, count);
  parts[0].waited += done.stall_beyond(seen);
  const int64_t end = nanoseconds();
  width.ran(wanted, count, parts, end - begin, end);
  if (failed.exchange(false)) std::rethrow_exception(std::exchange(failure, nullptr));
}
}  // namespace ollamapy::team
