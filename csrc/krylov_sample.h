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
  PYDEQSOLVE_HD explicit Power(int exponent) : low(power(exponent / 2)), high(power(exponent - exponent / 2)) {}
  PYDEQSOLVE_HD static double power(int e) {
    const std::uint64_t bits = static_cast<std::uint64_t>(e + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  PYDEQSOLVE_HD double operator()(double x) const { return x * low * high; }
  double low, high;
};

}  // namespace

// The exponent e with x / 2^e in [1/2, 1); of 0, infinity and NaN: 0.
PYDEQSOLVE_HD static inline int exponent_of(double x) {
  if (!(x > 0 && x < INFINITY)) return 0;
  const bool tiny = x < 0x1p-1022;
  const double normal = tiny ? x * 0x1p54 : x;
  std::uint64_t bits;
  memcpy(&bits, &normal, sizeof bits);
  return static_cast<int>(bits >> 52) - 1022 - (tiny ? 54 : 0);
}

// Begins a cycle of sample s, whose residual is `left`.
PYDEQSOLVE_HD static inline void start_cycle(KrylovSample& s, double left) {
  s.left = left;
  s.taken = s.sound = s.used = 0;
  s.going = s.active;
  s.broken = false;
}

// The system of sample i at its beginning. most: the largest |g|; squares: |g|^2, scaled.
PYDEQSOLVE_HD static inline KrylovSample system_of(bool out, double most, bool lost, double squares,
                                                   const KrylovTolerance& asked, std::int64_t i) {
  KrylovSample s{};
  s.out = out;
  s.lost = lost;
  s.exponent = lost ? 0 : exponent_of(most);
  s.best = square_root(squares);
  s.norm = s.best > 0 ? s.best : 1;
  const double rtol = asked.rtols ? asked.rtols[i] : asked.rtol, atol = asked.atols ? asked.atols[i] : asked.atol;
  s.goal = rtol * s.norm + Power(-s.exponent)(atol);
  const double resolved = asked.eps * s.norm;
  s.pursued = s.goal > resolved ? s.goal : resolved;
  s.active = s.best > s.pursued;
  return s;
}

// What is known of a residual that was measured at a u with rounding eps: not less than eps |u|. NaN stays.
PYDEQSOLVE_HD static inline double blurred(double squares, double length, double eps) {
  const double size = square_root(squares), least = eps * square_root(length);
  return size >= least || size != size ? size : least;
}

// How the solve of a sample has ended.
PYDEQSOLVE_HD static inline int outcome_of(const KrylovSample& s) {
  if (!(s.best < INFINITY)) return kNonfinite;
  if (s.best <= s.pursued) return kConverged;
  return s.stalled ? kStalled : kMaxSteps;
}

// Whether components h (k) of w, squares = w . w, are no more than its rounding.
PYDEQSOLVE_HD static inline bool is_rounding(int k, const double* h, double squares, double eps) {
  double sum = 0;
  for (int j = 0; j < k; ++j) sum += h[j] * h[j];
  return sum <= eps * eps * squares;
}

// Takes the better of the u that were measured, or keeps the last one, and begins the next cycle. totals:
// |g + A u - u|^2 and |u|^2 of u_1, and where `two` of u_2.
PYDEQSOLVE_HD static inline void accept_sample(KrylovSample& s, const double* totals, bool two, double eps) {
  s.chosen = -1;
  if (!s.active) return;
  double size = blurred(totals[0], totals[1], eps);
  int from = 1;
  if (two) {  // a huge u has to gain by a direction that I - A nearly loses what its rounding costs
    const double careful = blurred(totals[2], totals[3], eps);
    if (!(size < 0.5 * careful)) size = careful, from = 2;
  }
  s.evaluations += s.used + (two ? 2 : 1);
  // A residual that is mostly the rounding of a huge u is hardly known: it has to be less by more than that.
  const double length = square_root(from == 1 ? totals[1] : totals[3]);
  const double enough = eps * length > 0.5 * size ? 0.5 * s.best : 0.999 * s.best;
  const bool better = size < enough || (size < s.best && size <= s.pursued);
  s.stalled = !better;
  s.chosen = static_cast<std::int8_t>(better ? from : 0);
  if (better) s.length = length;
  s.best = better ? size : size - size == 0 ? s.best : INFINITY;
  s.active = s.best > s.pursued && s.best < INFINITY && !s.stalled;
  start_cycle(s, s.best);
}

// After u was scaled back: `differing` entries of it are not what they were.
PYDEQSOLVE_HD static inline void raise_sample(KrylovSample& s, double differing) {
  if (!s.told) s.ended = outcome_of(s);
  s.changed = differing > 0 && s.best < INFINITY;
}

// Of values that stand for u in another dtype: `bad` entries are not finite, `differing` ones not what they were.
PYDEQSOLVE_HD static inline void lower_sample(KrylovSample& s, double bad, double differing) {
  s.changed = s.changed || (differing > 0 && s.best < INFINITY);
  if (s.changed) ++s.evaluations;
  s.chosen = bad == 0;
  if (!s.chosen) s.best = INFINITY;
}

// Takes in a u that another method has found. totals: |g + A u - u|^2 and |u|^2, the first where it was measured.
PYDEQSOLVE_HD static inline void settle_sample(KrylovSample& s, const double* totals, const KrylovTold& told,
                                               std::int64_t i, double eps) {
  s.length = square_root(totals[1]);
  s.best = told.residual ? told.residual[i] : blurred(totals[0], totals[1], eps);
  s.evaluations = static_cast<std::int32_t>(told.evaluations ? told.evaluations[i] : told.calls);
  s.told = told.status != nullptr;
  if (s.told) s.ended = static_cast<std::int32_t>(told.status[i]);
}

constexpr double kRounding = 2;  // units of rounding of u within which a residual is as small as it gets

// Status of one sample, whose residual is raised to what is known of it: `AdjointSolve._judge` of
// pydeqsolve/derivative/adjoint.py.
PYDEQSOLVE_HD static inline int status_of(KrylovSample& s, const KrylovJudgement& rule) {
  if (!rule.adjoint) return s.lost ? kNonfinite : outcome_of(s);
  const double floor = rule.eps * s.length;
  int status = s.ended;
  s.best = s.best >= floor || s.best != s.best ? s.best : floor;
  double goal = s.goal;
  if (rule.follows) {  // no finer than rounding, but half of the digits are the least that deserve the name
    const double least = rule.eps * s.norm, allowed = kRounding * (floor > least ? floor : least);
    const double half = square_root(rule.eps) * s.norm, most = allowed < half ? allowed : half;
    goal = goal > most ? goal : most;
  }
  const bool met = s.best <= goal;
  if (!met && (status == kConverged || (status == kMaxSteps && floor > goal))) status = kStalled;
  if (met) status = kConverged;
  return s.best < INFINITY && !s.lost ? status : kNonfinite;
}

// What is told of sample i. Returns whether it was asked for and failed.
PYDEQSOLVE_HD static inline bool tell_sample(KrylovSample& s, const KrylovJudgement& rule, std::int64_t i,
                                             std::int64_t* status, double* residual, std::int64_t* evaluations) {
  const int found = status_of(s, rule);
  status[i] = s.out ? kNonfinite : found;
  residual[i] = s.lost || !(s.best < INFINITY) ? INFINITY : s.best / s.norm;
  evaluations[i] = s.evaluations;
  return found != kConverged && !s.out;
}

}  // namespace pydeqsolve
