// Passes over rows of logits. What is selected from what they leave is in ../sampling.cpp: sorting gains nothing from vectors, and
// a template of the standard library instantiated here could be linked into code for lesser CPUs.
#include "families.h"
#include "simd.h"

namespace ollamapy::OLLAMAPY_ISA {
namespace {

// e^x for x <= 0, relative error below 3e-16; 0 below -700. In double: a float's rounding would show in sums of 262,144 of them
// and move the last token of a nucleus. Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
INLINE double exp_negative(double x) {
  const double magic = 0x1.8p52, y = x < -700.0 ? -700.0 : x;
  const double shifted = y * 0x1.71547652b82fep0 + magic, n = shifted - magic;
  const double r = (y - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits, power;
  memcpy(&bits, &p, 8);
  memcpy(&power, &shifted, 8);
  bits += power << 52;
  memcpy(&p, &bits, 8);
  return x < -700.0 ? 0.0 : p;
}

}  // namespace

// x: `groups` times 256 floats; out[16 * g + j] is the largest of x[256 * g + j + 16 * i], i = 0..15. False when there is a NaN or
// a positive infinity, and then `out` is worth nothing.
bool lane_maxima(const float* x, int64_t groups, float* out) {
  const F lowest = splat(-3.4028234663852886e38f);
  F wrong = splat(0.0f);  // becomes NaN
  for (int64_t g = 0; g < groups; g++) {
    F top = load(x + 256 * g);
    for (int i = 0; i < 16; i++) {
      const F v = load(x + 256 * g + 16 * i), y = max(lowest, v);  // keeps a NaN on the right, lifts minus infinity
      wrong = add(wrong, sub(y, y));
      top = max(top, v);
    }
    store(out + 16 * g, top);
  }
  return reduce_add(wrong) == 0.0f;
}

// w[i] = exp((x[i] - best) / temperature) for n <= 1024; best is not below any x[i]. Returns their sum, added in one order.
double exp_weights(const float* x, int64_t n, double best, double temperature, double* w) {
  if (temperature == 1.0) {
    for (int64_t i = 0; i < n; i++) w[i] = double(x[i]) - best;
  } else {
    for (int64_t i = 0; i < n; i++) w[i] = (double(x[i]) - best) / temperature;
  }
  for (int64_t i = 0; i < n; i++) w[i] = exp_negative(w[i]);
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] += w[i + j];
  for (; i < n; i++) lanes[0] += w[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

}  // namespace ollamapy::OLLAMAPY_ISA
