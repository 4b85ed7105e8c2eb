// The calling thread and its helpers, one per core. A waiting thread spins for some microseconds and then sleeps.
//
// Why not OpenMP: its barriers spin for milliseconds, and when another process takes one of our cores a spinning waiter keeps
// the core that the late thread needs. With the daemon beside a two-thread engine on two cores, a barrier then cost a time
// slice (2.7 ms measured) instead of 0.2 us. What is left of that, a sleep until the late thread has its core again, is kept
// away by leaving threads out of runs while they cost more than they bring.
#pragma once
#include <cstdint>

namespace ollamapy::team {

using Work = void (*)(void* argument, int thread, int count);

// Of the team from now on, the caller included; at the start: 1. The helpers that are there end: those that a
// load started have its niceness, and only a privileged thread could take it from them.
void set_size(int threads);
int size();

// Runs work on `count` threads or fewer, the caller being thread 0, and returns when all have returned: `work` is told how many
// they are, and nothing that it computes may depend on it. One caller at a time. What `work` throws on any of them (the first of
// several) is thrown here; work that meets at barriers must not.
void run(int count, Work work, void* argument);
void barrier(int count);  // meets all threads of the running work

// A thread's way through [0, n), for work whose time is long enough that another process may take a core meanwhile: its own even
// share piece by piece, in ascending order, and then the pieces of others that they have not come to. `turn` counts the Pieces
// of a run, and between two of them lies a barrier.
class Pieces {
 public:
  Pieces(int64_t n, int thread, int count, int turn);
  bool next(int64_t& begin, int64_t& end);

 private:
  int64_t n_;
  int count_, turn_, at_, left_;  // whose share is at hand, and how many others are left
};

// body(begin, end) over [0, n) in even shares, on one thread for every `grain` items up to the team's size.
template <class Body>
void share(int64_t n, int64_t grain, const Body& body) {
  struct Call { const Body& body; int64_t n; } call{body, n};
  const int64_t threads = n / (grain > 0 ? grain : 1);
  run(int(threads < 1 ? 1 : threads < size() ? threads : size()),
      [](void* p, int thread, int count) {
        const Call& c = *static_cast<Call*>(p);
        const int64_t begin = c.n * thread / count, end = c.n * (thread + 1) / count;
        if (begin < end) c.body(begin, end);
      },
      &call);
}

// body(begin, end) over [0, n) by pieces.
template <class Body>
void deal(int64_t n, const Body& body) {
  struct Call { const Body& body; int64_t n; } call{body, n};
  run(int(n < 1 ? 1 : n < size() ? n : size()),
      [](void* p, int thread, int count) {
        const Call& c = *static_cast<Call*>(p);
        Pieces pieces(c.n, thread, count, 0);
        for (int64_t begin, end; pieces.next(begin, end);) c.body(begin, end);
      },
      &call);
}

}  // namespace ollamapy::team
