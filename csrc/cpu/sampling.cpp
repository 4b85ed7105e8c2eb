// Sampling from rows of logits: the likeliest tokens, totals, masks, one token drawn. Bindings and selection; the passes over whole rows
// are in isa/sampling.cpp.
//
// Tokens are ranked by logit, the lower id first among equals. Everything here is a function of one row: threads take whole
// rows, and sums have one order. top_k, top_p and min_p each keep a head of the ranking, so no row is ever sorted as a whole:
// it is dealt into buckets by logit, and only the buckets where a head ends or the drawn token lies are.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "kernels.h"
#include "team.h"

namespace ollamapy {
namespace {

constexpr int64_t kGroup = 256, kLanes = 16, kStretch = 1024, kBuckets = 4096;
constexpr int64_t kMostRanked = 1024;  // a top_k up to this is ranked at once, without buckets
constexpr double kMostSpread = 64.0;   // logits further below the best share the last bucket

struct Token {
  float logit;
  int32_t id;
};
bool before(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

struct Row {
  const float* x;
  int64_t n;
};

// The largest of each lane of each group (isa/sampling.cpp), a ragged end filled up with minus infinities.
bool maxima(Row row, std::vector<float>& out) {
  const int64_t whole = row.n / kGroup, rest = row.n % kGroup;
  out.resize((whole + (rest > 0)) * kLanes);
  bool finite = kernels().lane_maxima(row.x, whole, out.data());
  if (rest) {
    float tail[kGroup];
    std::fill(std::copy(row.x + whole * kGroup, row.x + row.n, tail), tail + kGroup, -INFINITY);
    finite &= kernels().lane_maxima(tail, 1, out.data() + whole * kLanes);
  }
  return finite;
}

// The k-th largest, 1 <= k <= values.size(). Many are thinned out by their own maxima first.
float kth_largest(const std::vector<float>& values, int64_t k) {
  const int64_t n = values.size();
  std::vector<float> left;
  if (n < 4096 || n < 2 * kLanes * k) {
    left = values;
  } else {
    std::vector<float> top;
    maxima({values.data(), n}, top);
    const float least = kth_largest(top, k);
    for (int64_t b = 0; b < int64_t(top.size()); b++) {
      if (top[b] < least) continue;
      const int64_t first = b / kLanes * kGroup + b % kLanes;
      for (int64_t i = first; i < std::min(first + kGroup, n); i += kLanes)
        if (values[i] >= least) left.push_back(values[i]);
    }
  }
  std::nth_element(left.begin(), left.begin() + (k - 1), left.end(), std::greater<float>());
  return left[k - 1];
}

// The k first of the ranking, 1 <= k <= n, given the row's maxima: each of them is in a lane whose maximum is among the k largest.
void rank(Row row, const std::vector<float>& top, int64_t k, std::vector<Token>& found) {
  const float least = k < int64_t(top.size()) ? kth_largest(top, k) : -INFINITY;
  const size_t most_equal = 2 * k + kGroup;
  std::vector<Token> equal;
  found.clear();
  for (int64_t b = 0; b < int64_t(top.size()); b++) {
    if (!(top[b] > least || (top[b] == least && equal.size() < most_equal))) continue;
    const int64_t first = b / kLanes * kGroup + b % kLanes;
    for (int64_t i = first; i < std::min(first + kGroup, row.n); i += kLanes) {
      if (row.x[i] > least) found.push_back({row.x[i], int32_t(i)});
      else if (row.x[i] == least) equal.push_back({row.x[i], int32_t(i)});
    }
  }
  if (int64_t(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + k, found.end(), before);
    found.resize(k);
  }
  std::sort(found.begin(), found.end(), before);
  const int64_t missing = k - int64_t(found.size());
  if (equal.size() >= most_equal) {  // many equals: those of lowest id are the first of the row
    for (int64_t i = 0, left = missing; left > 0; i++)
      if (row.x[i] == least) found.push_back({least, int32_t(i)}), left--;
  } else {
    std::sort(equal.begin(), equal.end(), before);
    found.insert(found.end(), equal.begin(), equal.begin() + missing);
  }
}

double log_total(Row row, float best) {
  double weights[kStretch], total = 0.0;
  for (int64_t i = 0; i < row.n; i += kStretch) total += kernels().exp_weights(row.x + i, std::min(kStretch, row.n - i), best, 1.0, weights);
  return best + std::log(total);
}

struct Cuts {
  double temperature, top_p, min_p, uniform;  // temperature <= 0: the likeliest; top_p >= 1 and min_p <= 0: off
  int64_t top_k;                              // 0: off
};
struct Drawn {
  int64_t id;
  double probability;  // among the tokens kept
};

// A ranking in buckets, each of which comes before the next; inside they are sorted when they are looked at.
class Ranking {
 public:
  Ranking(Row row, float best, const std::vector<float>& top, const Cuts& cuts) : row_(row), best_(best), temperature_(cuts.temperature) {
    if (cuts.top_k > 0 && cuts.top_k <= kMostRanked) {
      std::vector<Token> head;
      rank(row, top, std::min(cuts.top_k, row.n), head);
      counts_ = {int64_t(head.size())};
      sums_.resize(1);
      sorted_.push_back(make_sorted(0, std::move(head)));
      for (size_t i = 0; i < sorted_[0].tokens.size(); i++) sums_[0].mass += sorted_[0].mass[i], sums_[0].hot += sorted_[0].hot[i];
    } else {
      deal();
    }
  }

  Drawn draw(const Cuts& cuts) {
    Place end{int64_t(counts_.size()), 0};
    if (cuts.top_k > 0) end = std::min(end, after(cuts.top_k));
    if (cuts.top_p < 1.0) end = std::min(end, nucleus(cuts.top_p * sum_before(end).mass, end));
    if (cuts.min_p > 0.0) end = std::min(end, at_least(std::min(cuts.min_p, 1.0)));
    return pick(cuts.uniform, end);
  }

 private:
  using Place = std::pair<int64_t, int64_t>;  // all of the buckets before it, and so many of this one
  struct Sums {
    double mass = 0.0, hot = 0.0;  // at temperature 1, and at the request's
  };
  struct Sorted {
    int64_t bucket;
    std::vector<Token> tokens;
    std::vector<double> mass, hot;
  };

  int64_t bucket_of(float x) const {
    const float place = (best_ - x) * scale_;
    return place < float(kBuckets - 1) ? int64_t(place) : kBuckets - 1;
  }

  void deal() {
    float least = best_;
    for (int64_t i = 0; i < row_.n; i += 16)  // a sample will do: it only shapes the buckets
      if (row_.x[i] < least && row_.x[i] > -FLT_MAX) least = row_.x[i];
    const float spread = float(std::min(double(best_) - least, kMostSpread));
    scale_ = spread > 0.0f ? kBuckets / spread : 1.0f;
    counts_.assign(kBuckets, 0);
    sums_.assign(kBuckets, {});
    buckets_.resize(row_.n);
    double mass[kStretch], hot[kStretch];
    const double* warm = temperature_ == 1.0 ? mass : hot;
    for (int64_t i = 0; i < row_.n; i += kStretch) {
      const int64_t n = std::min(kStretch, row_.n - i);
      kernels().exp_weights(row_.x + i, n, best_, 1.0, mass);
      if (warm == hot) kernels().exp_weights(row_.x + i, n, best_, temperature_, hot);
      for (int64_t j = 0; j < n; j++) {
        const int64_t b = bucket_of(row_.x[i + j]);
        buckets_[i + j] = uint16_t(b);
        counts_[b] += 1;
        sums_[b].mass += mass[j];
        sums_[b].hot += warm[j];
      }
    }
  }

  Sorted make_sorted(int64_t bucket, std::vector<Token>&& tokens) const {
    std::sort(tokens.begin(), tokens.end(), before);
    Sorted made{bucket, std::move(tokens), {}, {}};
    std::vector<float> logits;
    for (const Token& token : made.tokens) logits.push_back(token.logit);
    made.mass.resize(logits.size());
    made.hot.resize(logits.size());
    for (size_t i = 0; i < logits.size(); i += kStretch) {
      const int64_t n = std::min<int64_t>(kStretch, logits.size() - i);
      kernels().exp_weights(logits.data() + i, n, best_, 1.0, made.mass.data() + i);
      kernels().exp_weights(logits.data() + i, n, best_, temperature_, made.hot.data() + i);
    }
    return made;
  }

  const Sorted& sorted(int64_t bucket) {
    for (const Sorted& made : sorted_)
      if (made.bucket == bucket) return made;
    std::vector<Token> tokens;
    tokens.reserve(counts_[bucket]);
    for (int64_t i = 0; i < row_.n; i++)
      if (buckets_[i] == bucket) tokens.push_back({row_.x[i], int32_t(i)});
    sorted_.push_back(make_sorted(bucket, std::move(tokens)));
    return sorted_.back();
  }

  Sums sum_before(Place end) {
    Sums total;
    for (int64_t b = 0; b < end.first; b++) total.mass += sums_[b].mass, total.hot += sums_[b].hot;
    if (end.second) {
      const Sorted& last = sorted(end.first);
      for (int64_t i = 0; i < end.second; i++) total.mass += last.mass[i], total.hot += last.hot[i];
    }
    return total;
  }

  Place after(int64_t count) const {
    int64_t b = 0;
    for (; b < int64_t(counts_.size()) && counts_[b] <= count; b++) count -= counts_[b];
    return {b, b < int64_t(counts_.size()) ? count : 0};
  }

  // The smallest head whose mass reaches the limit, of one token at least.
  Place nucleus(double limit, Place end) {
    double sum = 0.0;
    for (int64_t b = 0; b < std::min<int64_t>(end.first + 1, counts_.size()); b++) {
      if (sum > 0.0 && sum >= limit) return {b, 0};
      if (sum + sums_[b].mass < limit) {
        sum += sums_[b].mass;
        continue;
      }
      const Sorted& here = sorted(b);
      for (int64_t i = 0; i < counts_[b]; i++) {
        if (sum > 0.0 && sum >= limit) return {b, i};
        sum += here.mass[i];
      }
    }
    return end;
  }

  // The head of tokens that are at least `limit` times as likely as the first.
  Place at_least(double limit) {
    const int64_t near = counts_.size() == 1 ? 0 : bucket_of(float(best_ + std::log(limit)));
    for (int64_t b = std::max<int64_t>(near - 1, 0); b < int64_t(counts_.size()); b++) {
      if (!counts_[b]) continue;
      const Sorted& here = sorted(b);
      const int64_t count = std::partition_point(here.mass.begin(), here.mass.end(), [&](double mass) { return mass >= limit; }) - here.mass.begin();
      if (count < counts_[b]) return {b, count};
    }
    return {int64_t(counts_.size()), 0};
  }

  Drawn pick(double uniform, Place end) {
    const double total = sum_before(end).hot, target = uniform * total;
    double sum = 0.0;
    Drawn drawn{-1, 0.0};  // u * total may round up to the total: then the last token that can be drawn
    for (int64_t b = 0; b <= end.first && b < int64_t(counts_.size()); b++) {
      const int64_t count = b < end.first ? counts_[b] : end.second;
      if (!count) continue;
      if (b < end.first && sum + sums_[b].hot <= target && later(b, end)) {
        sum += sums_[b].hot;
        continue;
      }
      const Sorted& here = sorted(b);
      for (int64_t i = 0; i < count; i++) {
        if (here.hot[i] > 0.0) drawn = {here.tokens[i].id, here.hot[i] / total};
        sum += here.hot[i];
        if (sum > target) return drawn;
      }
    }
    return drawn;
  }

  bool later(int64_t bucket, Place end) const {  // whether anything that can be drawn follows
    for (int64_t b = bucket + 1; b < end.first; b++)
      if (sums_[b].hot > 0.0) return true;
    return end.second > 0;
  }

  Row row_;
  float best_, scale_ = 1.0f;
  double temperature_;
  std::vector<int64_t> counts_;
  std::vector<Sums> sums_;
  std::vector<uint16_t> buckets_;  // of each token
  std::vector<Sorted> sorted_;
};

// From the whole row, in the order of ids.
Drawn draw_from_all(Row row, float best, double temperature, double uniform) {
  double weights[kStretch], total = 0.0, sum = 0.0;
  std::vector<double> sums;
  for (int64_t i = 0; i < row.n; i += kStretch) {
    sums.push_back(kernels().exp_weights(row.x + i, std::min(kStretch, row.n - i), best, temperature, weights));
    total += sums.back();
  }
  const double target = std::min(uniform * total, std::nextafter(total, 0.0));
  size_t chunk = 0;  // the one in which the running sum passes the target: the last sum is the total
  while (sum + sums[chunk] <= target) sum += sums[chunk++];
  const int64_t first = chunk * kStretch, n = std::min(kStretch, row.n - first);
  kernels().exp_weights(row.x + first, n, best, temperature, weights);
  Drawn drawn{-1, 0.0};  // inside the chunk the sum is added in another order, and may just not pass it
  for (int64_t i = 0; i < n && (drawn.id < 0 || sum <= target); i++) {
    if (weights[i] > 0.0) drawn = {first + i, weights[i] / total};
    sum += weights[i];
  }
  return drawn;
}

Drawn draw_row(Row row, const Cuts& cuts) {
  std::vector<float> top;
  const bool finite = maxima(row, top);
  const float best = *std::max_element(top.begin(), top.end());
  if (!finite || best == -INFINITY) return {-1, 0.0};
  if (cuts.temperature <= 0.0) {
    std::vector<Token> first;
    rank(row, top, 1, first);
    return {first[0].id, 1.0};
  }
  if (cuts.top_k <= 0 && cuts.top_p >= 1.0 && cuts.min_p <= 0.0) return draw_from_all(row, best, cuts.temperature, cuts.uniform);
  return Ranking(row, best, top, cuts).draw(cuts);
}

// The n <= 32 logits of a word of a mask: a grammar's words are all ones or all zeros, but for a few bits.
void forbid_word(float* x, int64_t n, uint32_t allowed) {
  const uint32_t all = n < 32 ? (1u << n) - 1 : ~0u;
  allowed &= all;
  if (allowed == all) return;
  if (__builtin_popcount(allowed) > 16) {
    for (uint32_t left = all & ~allowed; left; left &= left - 1) x[__builtin_ctz(left)] = -INFINITY;
    return;
  }
  float kept[32];
  for (uint32_t left = allowed; left; left &= left - 1) kept[__builtin_ctz(left)] = x[__builtin_ctz(left)];
  std::fill(x, x + n, -INFINITY);
  for (uint32_t left = allowed; left; left &= left - 1) x[__builtin_ctz(left)] = kept[__builtin_ctz(left)];
}

void check_logits(const char* op, const Tensor& logits) {
  check_type(op, "logits", logits, ScalarType::Float, 2);
  check_contiguous_rows(op, "logits", logits);
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(1) < (int64_t(1) << 31), op, ": rows of ", logits.size(1), " logits");
}

Row row_of(const Tensor& logits, int64_t i) { return {static_cast<const float*>(logits.data_ptr()) + i * logits.stride(0), logits.size(1)}; }
int64_t grain_of(const Tensor& logits) { return std::max<int64_t>(1, 16384 / logits.size(1)); }

std::tuple<Tensor, Tensor> largest(Tensor logits, int64_t count) {
  check_logits("largest", logits);
  STD_TORCH_CHECK(count > 0, "largest: count is ", count);
  const int64_t k = std::min(count, logits.size(1));
  Tensor values = torch::stable::empty({logits.size(0), k}, ScalarType::Float), ids = torch::stable::empty({logits.size(0), k}, ScalarType::Long);
  team::share(logits.size(0), grain_of(logits), [&](int64_t begin, int64_t end) {
    std::vector<float> top;
    std::vector<Token> found;
    for (int64_t r = begin; r < end; r++) {
      float* value = static_cast<float*>(values.data_ptr()) + r * k;
      int64_t* id = static_cast<int64_t*>(ids.data_ptr()) + r * k;
      const bool finite = maxima(row_of(logits, r), top);
      if (finite) rank(row_of(logits, r), top, k, found);
      for (int64_t i = 0; i < k; i++) {
        value[i] = finite ? found[i].logit : NAN;
        id[i] = finite ? found[i].id : i;
      }
    }
  });
  return {values, ids};
}

Tensor log_totals(Tensor logits) {
  check_logits("log_totals", logits);
  Tensor out = torch::stable::empty({logits.size(0)}, ScalarType::Double);
  team::share(logits.size(0), grain_of(logits), [&](int64_t begin, int64_t end) {
    std::vector<float> top;
    for (int64_t r = begin; r < end; r++) {
      const bool finite = maxima(row_of(logits, r), top);
      const float best = *std::max_element(top.begin(), top.end());
      static_cast<double*>(out.data_ptr())[r] = !finite ? NAN : best == -INFINITY ? -INFINITY : log_total(row_of(logits, r), best);
    }
  });
  return out;
}

void forbid(Tensor logits, Tensor rows, Tensor bits) {
  check_logits("forbid", logits);
  const int64_t n = rows.numel(), size = logits.size(1), words = (size + 31) / 32;
  check_vector("forbid", "rows", rows, ScalarType::Long, n);
  check_type("forbid", "bits", bits, ScalarType::Int, 2);
  STD_TORCH_CHECK(bits.size(0) == n && bits.size(1) >= words && bits.is_contiguous(), "forbid: bits is not a contiguous (", n, ", ", words, " or more)");
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = data<int64_t>(rows)[i];
    STD_TORCH_CHECK(row >= 0 && row < logits.size(0), "forbid: row ", row, " of ", logits.size(0));
  }
  constexpr int64_t kPiece = 2048;  // words: what a thread does in some 10 us
  const int64_t pieces = (words + kPiece - 1) / kPiece;
  team::share(n * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t i = item / pieces, first = item % pieces * kPiece;
      float* x = data<float>(logits) + data<int64_t>(rows)[i] * logits.stride(0);
      const int32_t* allowed = data<int32_t>(bits) + i * bits.size(1);
      for (int64_t w = first; w < std::min(first + kPiece, words); w++) forbid_word(x + 32 * w, std::min<int64_t>(32, size - 32 * w), allowed[w]);
    }
  });
}

std::tuple<Tensor, Tensor> draw(Tensor logits, Tensor cuts) {
  check_logits("draw", logits);
  check_type("draw", "cuts", cuts, ScalarType::Double, 2);
  const int64_t n = logits.size(0);
  STD_TORCH_CHECK(cuts.size(0) == n && cuts.size(1) == 5 && cuts.is_contiguous(), "draw: cuts is not a contiguous (", n, ", 5)");
  Tensor ids = torch::stable::empty({n}, ScalarType::Long), probabilities = torch::stable::empty({n}, ScalarType::Double);
  team::share(n, grain_of(logits), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const double* c = static_cast<const double*>(cuts.data_ptr()) + r * 5;
      const Row row = row_of(logits, r);
      const Drawn drawn = draw_row(row, {c[0], c[2], c[3], c[4], c[1] > 0.0 && c[1] < double(row.n) ? int64_t(c[1]) : 0});
      static_cast<int64_t*>(ids.data_ptr())[r] = drawn.id;
      static_cast<double*>(probabilities.data_ptr())[r] = drawn.probability;
    }
  });
  return {ids, probabilities};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ollamapy, CPU, m) {
  m.impl("largest", TORCH_BOX(&largest));
  m.impl("log_totals", TORCH_BOX(&log_totals));
  m.impl("forbid", TORCH_BOX(&forbid));
  m.impl("draw", TORCH_BOX(&draw));
}

}  // namespace ollamapy
