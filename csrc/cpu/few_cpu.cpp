// Solves of a few unknowns on the CPU: kLanes samples at once, one in each
// lane, through measurement, judgement, system and mixing. This file is
// compiled once per instruction set; see step_cpu.cpp. What a lane computes
// depends on its own sample alone, so the bits do not depend on which samples
// lie beside it.
#include "few.h"

#include <atomic>

#ifndef PYDEQSOLVE_ISA
#define PYDEQSOLVE_ISA portable
#endif

#include "cpu/few_rows.h"
#include "cpu/few_systems.h"
#include "cpu/parallel.h"
#include "judge.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr double kUnseen = 1e-160, kSmall = 1e-140, kGrown = 1e6;  // of retire.h

// What a measurement says of the samples in the lanes.
struct FewVerdict {
  Longs finished, rejected, older;  // older: rows before the newest
};

template <class Scalar, int N, bool full>
class FewStep {
 public:
  explicit FewStep(const FewCall& call) : c(call), rows_(call) {}

  // The k samples from i on; lanes beyond them repeat the last. Returns how
  // many have finished.
  int group(std::int64_t i, int k) {
    rows_.choose(i, k);
    const auto measured = rows_.measure();
    FewVerdict verdict = judge(measured, k);
    if (!c.last) {
      const Longs size = (verdict.finished | verdict.rejected) ? Longs{} : verdict.older;
      Lanes gamma[kFewSlots];
      const int used = systems_.solve(rows_, measured, size, gamma, lost_);
      counts_ += lost_ & (std::int64_t{1} << kRankLossesField.shift);
      rows_.mix(measured, used, gamma, verdict.rejected);
    }
    return keep(verdict, i, k);
  }

 private:
  // `judge` of judge.h in all lanes.
  FewVerdict judge(const Measured<Scalar, N>& m, int k) {
    const Rule& rule = c.rule;
    const std::int64_t* at = rows_.samples();
    if (c.evaluations > 1) {
      std::int64_t offsets[kLanes];
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) offsets[l] = 4 * at[l];
      const auto* const records = reinterpret_cast<const double*>(c.records);
      best_ = gathered(records, offsets), previous_ = gathered(records + 1, offsets);
      size_ = gathered(records + 2, offsets);
      counts_ = (Longs)gathered(records + 3, offsets);
    } else {
      best_ = previous_ = all<Lanes>(INFINITY), size_ = Lanes{}, counts_ = Longs{};
    }
    Longs steps = counts_ & static_cast<std::int64_t>(kFewStepsField.mask);
    Longs flat = counts_ >> kFlatField.shift & static_cast<std::int64_t>(kFlatField.mask);
    const Longs slots = Longs{} + (c.ring.slots - 1), older = steps < slots ? steps : slots;
    Lanes rtol = all<Lanes>(c.rtol), atol = all<Lanes>(c.atol);
    for (int l = 0; c.rtols && l < kLanes; ++l) rtol[l] = c.rtols[at[l]];
    for (int l = 0; c.atols && l < kLanes; ++l) atol[l] = c.atols[at[l]];

    const Lanes residual = m.residual, size = m.size, infinity = all<Lanes>(INFINITY);
    const Longs finite = (residual < infinity) & (size < infinity);
    Longs blew_up = Longs{};
    if (rule.safeguard > 0) blew_up = (steps > 1) & ~(finite & (residual <= rule.safeguard * previous_));
    Longs improved = finite & (residual < best_);
    const Lanes change = residual - previous_;
    const Longs unchanged = (change < Lanes{} ? -change : change) <= 4 * rule.eps * residual;
    const Longs at_floor = residual <= c.floor * size;
    flat = (unchanged | at_floor) & ~improved ? flat + 1 : Longs{};
    best_ = improved ? residual : best_;
    size_ = improved ? size : size_;
    const Longs exploded = previous_ > 1e3 * best_;
    Longs status = Longs{};  // plus one
    status = flat >= (at_floor ? Longs{} + kFlatSteps : Longs{} + (kFlatSteps + N)) ? Longs{} + (kStalled + 1) : status;
    const Longs sound = finite & ~blew_up;
    status = sound & (residual > best_ * kGrowth) ? Longs{} + (kDiverged + 1) : status;
    status = ~finite & ~blew_up ? (exploded ? Longs{} + (kDiverged + 1) : Longs{} + (kNonfinite + 1)) : status;
    const Longs converged = finite & ~(residual > atol + rtol * size);
    status = converged ? Longs{} + (kConverged + 1) : status;
    improved |= converged;
    best_ = converged ? residual : best_;
    size_ = converged ? size : size_;
    previous_ = sound ? residual : previous_;
    const Longs rejected = blew_up & (status == 0);
    if (c.last) {
      const Longs grown = (previous_ > kGrown * best_) & (previous_ < infinity);
      const Longs spent = grown ? Longs{} + (kDiverged + 1) : Longs{} + (kMaxSteps + 1);
      status = status == 0 ? spent : status;
    }
    const Longs finished = status != 0;
    steps = blew_up ? Longs{} : steps < 127 ? steps + 1 : steps;
    const std::int64_t totals = -(std::int64_t{1} << kRejectionsField.shift);
    counts_ = (counts_ & totals) + steps + (flat << kFlatField.shift) + (status << kStatusField.shift) +
              (rejected & (std::int64_t{1} << kRejectionsField.shift));
    if (any(finished)) {
      previous_ = finished ? residual : previous_;
      counts_ +=
          finished & static_cast<std::int64_t>(static_cast<std::uint64_t>(c.evaluations) << kEvaluationsField.shift);
      if constexpr (std::is_same_v<Scalar, double>) doubt(converged, rtol, atol, k);
    }
    rows_.keep_best(improved);
    return {finished, rejected, older};
  }

  // Squares of the residual asked for vanish where z is so small: that it was
  // met is not known.
  void doubt(const Longs& converged, const Lanes& rtol, const Lanes& atol, int k) {
    if (c.rule.norm == Norm::kMax) return;
    for (int l = 0; l < k; ++l) {
      const bool unseen = size_[l] < kSmall && atol[l] + rtol[l] * size_[l] < kUnseen && rtol[l] < INFINITY;
      if (converged[l] && unseen && !rows_.is_zero(l)) counts_[l] += std::int64_t{kStalled} << kStatusField.shift;
    }
  }

  // Writes the records back, and the finished ones into `done`.
  int keep(const FewVerdict& verdict, std::int64_t i, int k) {
    double out[3][kLanes];
    std::int64_t counts[kLanes], finished[kLanes];
    write<false>(out[0], best_), write<false>(out[1], previous_), write<false>(out[2], size_);
    std::memcpy(counts, &counts_, sizeof counts_);
    std::memcpy(finished, &verdict.finished, sizeof finished);
    const bool marks = (c.evaluations & (c.evaluations - 1)) == 0;
    int total = 0;
#pragma GCC unroll 8
    for (int l = 0; l < (full ? kLanes : k); ++l) {
      const std::int64_t at = rows_.samples()[l];
      c.records[at] = {out[0][l], out[1][l], out[2][l], static_cast<std::uint64_t>(counts[l])};
      c.done[i + l] = finished[l] != 0;
      total += finished[l] != 0;
      if (!marks) continue;
      FewPast& past = c.past[at];
      if (c.evaluations == 1) past = {INFINITY, 0, INFINITY, 0};
      past.earlier = past.recent, past.earlier_size = past.recent_size;
      past.recent = out[0][l], past.recent_size = out[2][l];
    }
    if (total > 0 && c.wide && !c.last) rows_.freeze(verdict.finished);
    return total;
  }

  const FewCall& c;
  FewRows<Scalar, N, full> rows_;
  FewSystems<Scalar, N, full> systems_{c.ring};
  Lanes best_, previous_, size_;
  Longs counts_, lost_;
};

template <class Scalar, int N>
std::int64_t step_of(const FewCall& call) {
  std::atomic<std::int64_t> finished{0};
  const std::int64_t bytes = call.n * (2 * call.ring.slots + 3) * N * static_cast<std::int64_t>(sizeof(Scalar));
  parallel_for(call.n, bytes, call.threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t whole = begin + (end - begin) / kLanes * kLanes;
    FewStep<Scalar, N, true> step(call);
    std::int64_t own = 0;
    for (std::int64_t i = begin; i < whole; i += kLanes) own += step.group(i, kLanes);
    if (whole < end) own += FewStep<Scalar, N, false>(call).group(whole, static_cast<int>(end - whole));
    finished += own;
  });
  return finished;
}

std::int64_t step(const FewCall& call) {
  std::int64_t finished = 0;
  with_scalar(call.ring.storage, [&](auto scalar) {
    using Scalar = decltype(scalar);
    finished = call.N == 1   ? step_of<Scalar, 1>(call)
               : call.N == 2 ? step_of<Scalar, 2>(call)
               : call.N == 3 ? step_of<Scalar, 3>(call)
                             : step_of<Scalar, 4>(call);
  });
  return finished;
}

}  // namespace

extern const FewPass few{step};

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
