// One sample's adjoint system: its scaling, its tolerance, and what is made of a residual.
#pragma once
#include <cmath>
#include <cstring>

#include "judge.h"
#include "krylov.h"

namespace pydeqsolve {

namespace {

// 2^exponent in two factors that are normal numbers, and x times it: exact wherever the product is a number.
struct Power {
  explicit Power(int exponent) : low(power(exponent / 2)), high(power(exponent - exponent / 2)) {}
  static double power(int e) {
    const std::uint64_t bits = static_cast<std::uint64_t>(e + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  double operator()(double x) const { return x * low * high; }
  double low, high;
};

}  // namespace

static inline int exponent_of(double x) {  // of 0, infinity and NaN: 0
  int exponent = 0;
  if (x > 0 && x < INFINITY) std::frexp(x, &exponent);
  return exponent;
}

// Begins a cycle of sample s, whose residual is `left`.
static inline void start_cycle(KrylovSample& s, double left) {
  s.left = left;
  s.taken = s.sound = s.used = 0;
  s.going = s.active;
  s.broken = false;
}

// The system of sample i at its beginning. most: the largest |g|; squares: |g|^2, scaled.
static inline KrylovSample system_of(bool out, double most, bool lost, double squares, const KrylovTolerance& asked,
                                     std::int64_t i) {
  KrylovSample s{};
  s.out = out;
  s.lost = lost;
  s.exponent = lost ? 0 : exponent_of(most);
  s.best = std::sqrt(squares);
  s.norm = s.best > 0 ? s.best : 1;
  const double rtol = asked.rtols ? asked.rtols[i] : asked.rtol, atol = asked.atols ? asked.atols[i] : asked.atol;
  s.goal = rtol * s.norm + Power(-s.exponent)(atol);
  const double resolved = asked.eps * s.norm;
  s.pursued = s.goal > resolved ? s.goal : resolved;
  s.active = s.best > s.pursued;
  return s;
}

// What is known of a residual that was measured at a u with rounding eps: not less than eps |u|. NaN stays.
static inline double blurred(double squares, double length, double eps) {
  const double size = std::sqrt(squares), least = eps * std::sqrt(length);
  return size >= least || size != size ? size : least;
}

// How the solve of a sample has ended.
static inline int outcome_of(const KrylovSample& s) {
  if (!(s.best < INFINITY)) return kNonfinite;
  if (s.best <= s.pursued) return kConverged;
  return s.stalled ? kStalled : kMaxSteps;
}

}  // namespace pydeqsolve
