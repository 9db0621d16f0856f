// One sample's judgement after a measurement, on the host. pydeqsolve/monitor.py says the same in PyTorch, for devices;
// a test holds the two together.
#pragma once
#include <cmath>
#include <cstdint>

#include "step.h"

namespace pydeqsolve {

// A row of the monitor's table: doubles, in the order of `COLUMNS` in monitor.py.
struct Record {
  double best, previous, flat, steps, status, evaluations, rejections, rank_losses, judged, improved, fresh,
      left_behind, residual, rtol, atol;
};

struct Judgement {
  double safeguard;  // growth of the residual at which an accelerated step is refused; 0 for solvers without any
  double eps;        // of the state's dtype
  double entries;    // of one sample, for the root mean square; 1 for other norms
  bool is_max;       // norms are maxima, not sums of squares
};

enum Status : int { kRunning = -1, kConverged = 0, kMaxSteps = 1, kStalled = 2, kDiverged = 3, kNonfinite = 4 };

constexpr int kFlatSteps = 10;
constexpr double kRounding = 8;

static inline Mode judge(Record& s, double residual, double size, bool lost_rank, const Judgement& rule) {
  s.residual = residual;
  s.rank_losses += lost_rank;
  s.judged = s.status == kRunning;
  s.left_behind = s.improved = 0;
  if (!s.judged) return kKeep;
  const bool finite = residual < INFINITY;
  const bool accelerated = rule.safeguard > 0 && s.steps >= 2;
  const bool blew_up = accelerated && !(finite && residual <= rule.safeguard * s.previous);
  s.improved = residual < s.best;
  const bool unchanged = std::fabs(residual - s.previous) <= 4 * rule.eps * residual;
  const bool at_floor = residual <= kRounding * rule.eps * size && s.improved == 0;
  s.flat = unchanged || at_floor ? s.flat + 1 : 0;
  if (s.improved != 0) s.best = residual;
  const bool exploded = s.previous > 1e3 * s.best;
  if (s.flat >= kFlatSteps) s.status = kStalled;
  if (finite && residual > s.best / (rule.eps * rule.eps)) s.status = kDiverged;
  if (!finite && !blew_up) s.status = exploded ? kDiverged : kNonfinite;
  if (finite && residual <= s.atol + s.rtol * size) {
    s.status = kConverged;
    s.improved = 1;  // what is returned is the iterate that met the tolerance, even where ||f|| was smaller before
    s.best = residual;
  }
  const bool running = s.status == kRunning;
  s.evaluations += 1;
  s.rejections += blew_up && running;
  if (finite) s.previous = residual;
  s.steps = blew_up ? 0 : s.steps + 1;
  s.left_behind = s.fresh != 0 && s.improved == 0;
  s.fresh = s.improved;
  return !running ? kKeep : blew_up ? kReject : kMix;
}

struct Counts {
  std::int64_t finished, left_behind;
};

// All n samples: norms (n, T, 2), dropped (n, T) of the step before or null, table (n,), mode (n, T).
static inline Counts judge_all(std::int64_t n, std::int64_t T, const double* norms, const std::int32_t* dropped,
                               Record* table, const Judgement& rule, std::uint8_t* mode) {
  Counts counts{0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    double total[2] = {0, 0};
    bool lost_rank = false;
    for (std::int64_t t = 0; t < T; ++t) {
      for (int which = 0; which < 2; ++which) {
        const double x = norms[(i * T + t) * 2 + which];
        total[which] = !rule.is_max ? total[which] + x : !(x <= total[which]) ? x : total[which];
      }
      lost_rank = lost_rank || (dropped && dropped[i * T + t] > 0);
    }
    for (double& x : total) x = rule.is_max ? x : std::sqrt(x / rule.entries);
    const Mode what = judge(table[i], total[0], total[1], lost_rank, rule);
    for (std::int64_t t = 0; t < T; ++t) mode[i * T + t] = what;
    counts.finished += table[i].status != kRunning;
    counts.left_behind += table[i].left_behind != 0;
  }
  return counts;
}

// Counts a step of T blocks that left differences out, dropped (T,), in its sample's record.
static inline void count_losses(Record& s, std::int64_t T, const std::int32_t* dropped) {
  bool lost_rank = false;
  for (std::int64_t t = 0; t < T; ++t) lost_rank = lost_rank || dropped[t] > 0;
  s.rank_losses += lost_rank;
}

}  // namespace pydeqsolve
