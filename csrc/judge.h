// One sample's judgement after a measurement. pydeqsolve/step/rules.py says the same in PyTorch, for devices without
// kernels; a test holds the two together.
#pragma once
#include <cmath>
#include <cstdint>

#include "core.h"

namespace pydeqsolve {

// Columns of the records of samples and blocks, doubles; pydeqsolve/step/records.py says what each is, and the module
// is not loaded where it has others.
// clang-format off
#define PYDEQSOLVE_SAMPLE(X)                                                                                       \
  X(best) X(previous) X(flat) X(steps) X(status) X(evaluations) X(rejections) X(rank_losses) X(judged) X(improved) \
  X(fresh) X(left_behind) X(residual) X(rtol) X(atol) X(size) X(recent) X(recent_size) X(earlier) X(earlier_size)  \
  X(unknowns) X(floor)
// clang-format on
#define PYDEQSOLVE_BLOCK(X) X(previous) X(steps) X(residual) X(done) X(rtol) X(atol)
#define PYDEQSOLVE_COLUMN(name) double name;

struct Sample {
  PYDEQSOLVE_SAMPLE(PYDEQSOLVE_COLUMN)
};

enum Status : int { kRunning = -1, kConverged = 0, kMaxSteps = 1, kStalled = 2, kDiverged = 3, kNonfinite = 4 };

constexpr int kFlatSteps = 10;
constexpr double kGrowth = 20282409603651670423947251286016.0;  // 2^104, growth that float64 does not recover from

PYDEQSOLVE_HD static inline Mode judge(Sample& s, double residual, double size, bool lost_rank, const Rule& rule) {
  s.residual = residual;
  s.rank_losses += lost_rank;
  s.judged = s.status == kRunning;
  s.left_behind = s.improved = 0;
  if (!s.judged) return kKeep;
  const bool finite = residual < INFINITY && size < INFINITY;  // a size that overflows would excuse any residual
  const bool accelerated = rule.safeguard > 0 && s.steps >= 2;
  const bool blew_up = accelerated && !(finite && residual <= rule.safeguard * s.previous);
  s.improved = finite && residual < s.best;
  const bool unchanged = magnitude(residual - s.previous) <= 4 * rule.eps * residual;
  const bool at_floor = residual <= s.floor * size;
  s.flat = (unchanged || at_floor) && s.improved == 0 ? s.flat + 1 : 0;
  if (s.improved != 0) s.best = residual, s.size = size;
  const bool exploded = s.previous > 1e3 * s.best;
  // A causal map may pass its residual on, unchanged, through as many steps as there are unknowns.
  if (s.flat >= kFlatSteps + (at_floor ? 0 : s.unknowns)) s.status = kStalled;
  if (finite && !blew_up && residual > s.best * kGrowth) s.status = kDiverged;
  if (!finite && !blew_up) s.status = exploded ? kDiverged : kNonfinite;
  if (finite && !(residual > s.atol + s.rtol * size)) {  // an infinite rtol takes any residual, of size 0 too
    s.status = kConverged;
    s.improved = 1;  // what is returned is the iterate that met the tolerance, even where ||f|| was smaller before
    s.best = residual, s.size = size;
  }
  const bool running = s.status == kRunning;
  s.evaluations += 1;
  s.rejections += blew_up && running;
  if (finite && !blew_up) s.previous = residual;
  s.steps = blew_up ? 0 : s.steps + 1;
  s.left_behind = s.fresh != 0 && s.improved == 0;
  s.fresh = s.improved;
  const std::int64_t count = static_cast<std::int64_t>(s.evaluations);
  if ((count & (count - 1)) == 0) {
    s.earlier = s.recent, s.earlier_size = s.recent_size;
    s.recent = s.best, s.recent_size = s.size;
  }
  return !running ? kKeep : blew_up ? kReject : kMix;
}

// The larger one, or NaN where either is.
PYDEQSOLVE_HD static inline double worse(double a, double b) { return a != a || a > b ? a : b; }

// All n samples: norms (n, T, 2), dropped (n, T) of the step before or null, table (n,), mode (n, T).
static inline Counts judge_samples(std::int64_t n, std::int64_t T, const double* norms, const std::int32_t* dropped,
                                   Sample* table, const Rule& rule, std::uint8_t* mode) {
  Counts counts{0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    double total[2] = {0, 0};
    bool lost_rank = false;
    for (std::int64_t t = 0; t < T; ++t) {
      for (int which = 0; which < 2; ++which) {
        const double x = norms[(i * T + t) * 2 + which];
        total[which] = rule.norm == Norm::kMax ? worse(total[which], x) : total[which] + x;
      }
      lost_rank = lost_rank || (dropped && dropped[i * T + t] > 0);
    }
    for (double& x : total) x = rule.norm == Norm::kMax ? x : std::sqrt(x / rule.divisor);
    const Mode what = judge(table[i], total[0], total[1], lost_rank, rule);
    for (std::int64_t t = 0; t < T; ++t) mode[i * T + t] = what;
    counts.finished += table[i].status != kRunning;
    counts.left_behind += table[i].left_behind != 0;
  }
  return counts;
}

// A block of a sample that is solved from the front.
struct Block {
  PYDEQSOLVE_BLOCK(PYDEQSOLVE_COLUMN)
};

struct Front {
  double margin;        // of its tolerance, within which a leading block finishes
  bool latest;          // a block that finishes takes the value f
  std::int64_t window;  // blocks wanted at a time, at most
};

// The residual of a whole sample, of its T blocks as last measured; infinite where one is not a number.
static inline double total_of(const Block* blocks, std::int64_t T, Norm norm) {
  double total = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    const double x = blocks[t].residual;
    total = norm == Norm::kMax ? worse(total, x) : total + x * x;
  }
  if (!(total < INFINITY)) return INFINITY;
  return norm == Norm::kMax ? total : std::sqrt(norm == Norm::kL2 ? total : total / static_cast<double>(T));
}

// What becomes of the T blocks of one sample; `judge_blocks` of rules.py in words. norms (T, 2) are those of r and f
// as measured, wanted (T,) said of which blocks; mode, broken and open (T,) are written, open being wanted of the next
// step.
static inline void judge_blocks(Sample& s, Block* blocks, std::int64_t T, const double* norms, const bool* wanted,
                                const Rule& rule, const Front& front, std::uint8_t* mode, bool* broken, bool* open) {
  const auto root = [&](double x) { return rule.norm == Norm::kMax ? x : std::sqrt(x / rule.divisor); };
  const auto sound = [&](std::int64_t t) { return root(norms[2 * t]) < INFINITY && root(norms[2 * t + 1]) < INFINITY; };
  const bool running = s.status == kRunning;
  std::int64_t first = 0;
  while (first < T && blocks[first].done != 0) ++first;
  std::int64_t reach = first;  // blocks first … reach − 1 are small: a leading run
  bool leading = true, within = running;
  for (std::int64_t t = first; t < T; ++t) {
    Block& b = blocks[t];
    const double r = root(norms[2 * t]), tolerance = b.atol + b.rtol * root(norms[2 * t + 1]);
    const bool measured = wanted[t] && sound(t);
    if (wanted[t]) b.residual = r;
    leading = leading && measured && !(r > front.margin * tolerance);
    if (leading) reach = t + 1;
    within = within && measured && (!(r > tolerance) || (t == first && t + 1 == T));  // that one becomes exact
  }
  const bool exact = first < T && wanted[first] && sound(first) && reach - first <= 1;
  const bool lost = first < T && wanted[first] && !sound(first);
  const bool converged = within, whole = converged && first + 1 < T;
  const double before = total_of(blocks, T, rule.norm);
  if (exact && (front.latest || !whole)) blocks[first].residual = 0;
  const std::int64_t end = whole ? T : exact ? first + 1 : running ? reach : first;
  if (running) s.status = converged ? kConverged : lost ? kNonfinite : kRunning;
  bool refused = false;
  std::int64_t left = s.status == kRunning ? front.window : 0;
  for (std::int64_t t = 0; t < T; ++t) {
    Block& b = blocks[t];
    const double r = root(norms[2 * t]);
    const bool finite = sound(t), finishes = t >= first && t < end;
    const bool accepted = finishes && wanted[t] && (front.latest || (t == first && exact && !whole));
    if (finishes) b.done = 1;
    const bool accelerated = rule.safeguard > 0 && b.steps >= 2;
    const bool blew_up = wanted[t] && accelerated && !(r <= rule.safeguard * b.previous) && b.previous < INFINITY &&
                         b.done == 0 && s.status == kRunning;
    refused = refused || blew_up;
    if (wanted[t] && finite) b.previous = r;
    broken[t] = wanted[t] && !finite && !blew_up;
    b.steps = blew_up || !wanted[t] || broken[t] ? 0 : b.steps + 1;
    const Mode what = accepted ? kAccept : blew_up ? kReject : b.done != 0 || broken[t] ? kKeep : kMix;
    mode[t] = wanted[t] ? what : kKeep;
    open[t] = b.done == 0 && left > 0;
    left -= open[t];
  }
  s.judged = running;
  s.evaluations += running;
  s.rejections += refused;
  if (running) s.best = s.residual = converged ? total_of(blocks, T, rule.norm) : before;
}

struct BlockCounts {
  std::int64_t finished, broken;  // samples, blocks
};

// All n samples; blocks, wanted, mode, broken and open (n, T).
static inline BlockCounts judge_all_blocks(std::int64_t n, std::int64_t T, const double* norms, const bool* wanted,
                                           Sample* table, Block* blocks, const Rule& rule, const Front& front,
                                           std::uint8_t* mode, bool* broken, bool* open) {
  BlockCounts counts{0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t at = i * T;
    judge_blocks(table[i], blocks + at, T, norms + 2 * at, wanted + at, rule, front, mode + at, broken + at, open + at);
    counts.finished += table[i].status != kRunning;
    for (std::int64_t t = 0; t < T; ++t) counts.broken += broken[at + t];
  }
  return counts;
}

// Counts a step of T blocks that left differences out, dropped (T,), in its sample's record.
static inline void count_losses(Sample& s, std::int64_t T, const std::int32_t* dropped) {
  bool lost_rank = false;
  for (std::int64_t t = 0; t < T; ++t) lost_rank = lost_rank || dropped[t] > 0;
  s.rank_losses += lost_rank;
}

}  // namespace pydeqsolve
