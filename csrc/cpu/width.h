// How many threads of a team take part: decided from what each did and how long it waited. Knows no threads itself.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ollamapy::team {
namespace {

constexpr int kMaxThreads = 256;

// A thread whose core another process has makes all wait, up to a time slice (3 ms) at each barrier. So the slowest is left out
// where the others would be faster alone; whether it can come back is tried after a pause, longer each time.
constexpr int64_t kMillisecond = 1000000;
constexpr int64_t kWindow = 20 * kMillisecond;  // of runs
constexpr int64_t kShortestPause = 100 * kMillisecond, kLongestPause = 1600 * kMillisecond;
constexpr double kMostWaited = 0.6;  // of the time of all but the last: threads that lose their cores in turns are equally slow
constexpr double kGain = 1.3;  // that must be expected: beside many processes two threads get twice the time of one

// What a thread did in a run: items of Pieces, and nanoseconds of waiting for others beyond what even shares explain.
struct alignas(64) Part {
  int64_t items = 0, waited = 0;
};

// How many threads a run may have.
class Width {
 public:
  // Of a run that wants `count`.
  int of(int count, int64_t now) {
    if (count > most() && now >= resume_) {
      most_.store(most() + 1, std::memory_order_relaxed);
      resume_ = now + kWindow;
      forget();
    }
    return std::min(count, most());
  }
  // A run that wanted `wanted` threads had `count` of them, who did these parts in so many nanoseconds.
  void ran(int wanted, int count, const Part* parts, int64_t nanoseconds, int64_t now) {
    if (count > widest_) forget();
    if (count < widest_) return;  // that tells nothing of those who were not needed
    widest_ = count;
    elapsed_ += nanoseconds;
    int64_t waited = 0, items = 0;
    for (int i = 0; i < count; i++) {
      sums_[i].items += parts[i].items;
      sums_[i].waited += parts[i].waited;
      waited += sums_[i].waited;
      items += sums_[i].items;
    }
    if (elapsed_ < kWindow && waited < (count - 1) * kWindow / 2) return;
    const bool waits = items && double(waited) > kMostWaited * double((count - 1) * elapsed_);
    if (waits || others_alone() > kGain) {
      most_.store(count - 1, std::memory_order_relaxed);
      resume_ = now + pause_;
      pause_ = std::min(2 * pause_, kLongestPause);
    } else if (elapsed_ < kWindow) {
      return;
    } else if (wanted == count) {
      pause_ = std::max(pause_ / 2, kShortestPause);
    }
    forget();
  }
  bool leaves_out(int thread) const { return thread >= most(); }
  void reset() {
    most_.store(kMaxThreads, std::memory_order_relaxed);
    pause_ = kShortestPause;
    forget();
  }

 private:
  int most() const { return most_.load(std::memory_order_relaxed); }
  void forget() {
    std::fill(sums_, sums_ + widest_, Part{});
    elapsed_ = widest_ = 0;
  }
  // The speed that all but the slowest would have if they never waited, in that of all together.
  double others_alone() const {
    double all = 0.0, speeds = 0.0, slowest = 0.0;
    for (int i = 0; i < widest_; i++) {
      const double speed = double(sums_[i].items) / double(std::max<int64_t>(elapsed_ - sums_[i].waited, 1));
      all += double(sums_[i].items);
      speeds += speed;
      slowest = i ? std::min(slowest, speed) : speed;
    }
    return all > 0 ? (speeds - slowest) * double(elapsed_) / all : 0.0;
  }

  std::atomic<int> most_{kMaxThreads};
  int widest_ = 0;
  int64_t resume_ = 0, pause_ = kShortestPause, elapsed_ = 0;
  Part sums_[kMaxThreads];
};

}  // namespace
}  // namespace ollamapy::team
