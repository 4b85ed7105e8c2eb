// The thread team alone: `check RUNS` runs changing numbers of threads through barriers; `fork RUNS` in a child, too;
// `throw` in some threads while others use the caller's frame;
// `late` has a thread that is late left out, and lets it come back; `width` asks when; `time SECONDS` prints how many runs of four barriers and
// some 80 us of work, which two threads share, get done; `idle` prints the CPU seconds that a team burns in a second without work.
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "../../csrc/cpu/team.h"
#include "../../csrc/cpu/width.h"

namespace team = ollamapy::team;

namespace {

constexpr int kMost = 7, kRounds = 5, kItems = 61;
struct Job {
  int seen[kRounds][kMost];
  int taken[kRounds][kItems];  // how often each item was a part of somebody's piece
  int expected;
  bool wrong;
};

void meet_often(void* argument, int thread, int count) {
  Job& job = *static_cast<Job*>(argument);
  for (int round = 0; round < kRounds; round++) {
    job.seen[round][thread] = job.expected + round;
    team::Pieces pieces(kItems, thread, count, round);
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t i = begin; i < end; i++) __atomic_fetch_add(&job.taken[round][i], 1, __ATOMIC_RELAXED);
    team::barrier(count);
    for (const int times : job.taken[round])
      if (times != 1) __atomic_store_n(&job.wrong, true, __ATOMIC_RELAXED);
    for (int other = 0; other < count; other++)
      if (job.seen[round][other] != job.expected + round) __atomic_store_n(&job.wrong, true, __ATOMIC_RELAXED);
  }
}

void check(int runs, unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < runs; i++) {
    Job job{};
    job.expected = i * kRounds + 1;
    const int count = 1 + int(random() % kMost);
    team::run(count, meet_often, &job);
    if (job.wrong) std::abort();
    std::vector<int> touched(random() % 40);
    team::set_size(1 + int(random() % kMost));
    team::share(int64_t(touched.size()), 1 + int64_t(random() % 5), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++) touched[size_t(j)] += 1;
    });
    team::deal(int64_t(touched.size()), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++) touched[size_t(j)] += 1;
    });
    for (const int times : touched)
      if (times != 2) std::abort();
    if (random() % 500 == 0) usleep(200);  // long enough for helpers to fall asleep
  }
}

struct Thrower {
  unsigned who;  // a bit for each thread
  int returned = 0, count = 0;
};
// Whatever a thread throws the caller gets, once all have returned; and the team goes on.
void throws() {
  for (unsigned who = 1; who < 16; who++) {
    Thrower job{who};
    bool caught = false;
    try {
      team::run(4, [](void* argument, int thread, int count) {
        Thrower& own = *static_cast<Thrower*>(argument);
        if (thread == 0) own.count = count;
        if (own.who >> thread & 1 && thread != 2) throw std::bad_alloc();
        usleep(3000);
        __atomic_fetch_add(&own.returned, 1, __ATOMIC_RELAXED);
        if (own.who >> thread & 1) throw std::bad_alloc();
      }, &job);
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    const unsigned there = who & ((1u << job.count) - 1);
    if (caught != (there != 0) || __atomic_load_n(&job.returned, __ATOMIC_RELAXED) != job.count - __builtin_popcount(there & ~4u)) std::abort();
    check(3, who);
  }
}

double now(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Late {
  Job job;
  bool late;  // the last thread is
  int count;
};
void meet_late(void* argument, int thread, int count) {
  Late& run = *static_cast<Late*>(argument);
  if (thread == 0) run.count = count;
  if (run.late && count > 1 && thread == count - 1) usleep(2000);
  meet_often(&run.job, thread, count);
}
// Runs of `size` threads, until one had `count` of them.
void meet_until(int size, int count, bool late) {
  const double end = now(CLOCK_MONOTONIC) + 60;
  for (int i = 0;; i++) {
    Late run{};
    run.job.expected = i * kRounds + 1;
    run.late = late;
    team::run(size, meet_late, &run);
    if (run.job.wrong || run.count < 1 || run.count > size || now(CLOCK_MONOTONIC) > end) std::abort();
    if (run.count == count) return;
  }
}

void expect(bool right) {
  if (!right) std::abort();
}
void widths() {
  constexpr int64_t ms = team::kMillisecond;
  const team::Part even[] = {{100, ms}, {100, ms}}, idle[] = {{0, 19 * ms}, {0, 0}};
  const team::Part prompt[] = {{65, 8 * ms}, {35, 3 * ms}};  // 0.65 of the work in 0.6 of the time
  const team::Part late[] = {{60, 15 * ms}, {40, 0}}, in_turns[] = {{50, 7 * ms}, {50, 7 * ms}};
  const team::Part one_of_four[] = {{30, 12 * ms}, {30, 12 * ms}, {30, 12 * ms}, {10, 0}}, quiet[4] = {{25, ms}, {25, 0}, {25, ms}, {25, ms}};
  team::Width width;
  int64_t now = 0;
  for (const team::Part* parts : {even, idle, prompt}) {
    for (int i = 0; i < 10; i++) width.ran(2, 2, parts, 20 * ms, now += 20 * ms);
    expect(width.of(2, now) == 2 && !width.leaves_out(1));
  }
  for (int64_t pause = 100; pause <= 400; pause *= 2) {
    width.ran(2, 2, pause == 200 ? in_turns : late, 20 * ms, now);
    expect(width.of(2, now + pause * ms - 1) == 1 && width.leaves_out(1) && !width.leaves_out(0));
    expect(width.of(2, now += pause * ms) == 2);
  }
  for (int i = 0; i < 3; i++) width.ran(2, 2, even, 20 * ms, now);
  width.ran(2, 2, late, 20 * ms, now);
  expect(width.of(2, now + 100 * ms - 1) == 1 && width.of(2, now + 100 * ms) == 2);
  width.reset();
  for (int i = 0; i < 10; i++) width.ran(4, 4, quiet, 2 * ms + 20 * ms, now);
  expect(width.of(4, now) == 4);
  width.ran(4, 4, one_of_four, 20 * ms, now);
  expect(width.of(4, now) == 3 && width.of(2, now) == 2);
}

void work_and_meet(void*, int thread, int count) {
  for (int round = 0; round < 4; round++) {
    team::Pieces pieces(8000, thread, count, round);
    for (int64_t begin, end; pieces.next(begin, end);) {
      volatile float x = 1.0f;
      for (int64_t i = begin; i < end; i++) x = x * 1.000001f;
    }
    team::barrier(count);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && !strcmp(argv[1], "check")) {
    check(std::atoi(argv[2]), 1);
    return 0;
  }
  if (argc > 2 && !strcmp(argv[1], "fork")) {
    check(std::atoi(argv[2]), 1);
    const pid_t child = fork();
    if (child == 0) {
      check(std::atoi(argv[2]), 2);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(std::atoi(argv[2]), 3);
    return status != 0;
  }
  if (argc > 1 && !strcmp(argv[1], "throw")) {
    throws();
    return 0;
  }
  if (argc > 1 && !strcmp(argv[1], "late")) {
    for (const int size : {2, 5}) {
      team::set_size(size);
      meet_until(size, size, false);
      meet_until(size, 1, true);
      meet_until(size, 2, false);  // a busy machine may have no time for more
    }
    return 0;
  }
  if (argc > 1 && !strcmp(argv[1], "width")) {
    widths();
    return 0;
  }
  if (argc > 2 && !strcmp(argv[1], "time")) {
    const double end = now(CLOCK_MONOTONIC) + std::atof(argv[2]);
    long runs = 0;
    for (; now(CLOCK_MONOTONIC) < end; runs++) team::run(2, work_and_meet, nullptr);
    std::printf("%ld\n", runs);
    return 0;
  }
  if (argc > 1 && !strcmp(argv[1], "idle")) {
    check(50, 1);
    double least = 1.0;  // beside other processes the yields before the sleep may take longer than a second
    for (int i = 0; i < 5 && least > 1e-3; i++) {
      usleep(20000);
      const double before = now(CLOCK_PROCESS_CPUTIME_ID);
      sleep(1);
      least = std::min(least, now(CLOCK_PROCESS_CPUTIME_ID) - before);
    }
    std::printf("%.4f\n", least);
    return 0;
  }
  return 2;
}
