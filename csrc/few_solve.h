// A solve of a few unknowns a sample as Python sees it. Included by bindings.cpp alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "few.h"
#include "judge.h"
#include "ring.h"

namespace pydeqsolve {
namespace {

class FewSolve {
 public:
  // rtols, atols: 0 where all samples share one. wide: fn sees all samples. Of the memory nothing need be written yet
  // but best (B, N), the first guesses. rows and ended (B,), done (B,).
  FewSolve(int storage, int slots, int kind, double eps, std::int64_t B, int N, std::int64_t slot_stride, double ridge,
           double damping, double safeguard, double divisor, int norm, double rtol, double atol, double floor,
           Address rtols, Address atols, bool wide, Address R, Address F, Address best, Address records, Address past,
           Address rows, Address ended, Address done)
      : B_(B), n_(B), rows_(at<std::int64_t>(rows)), ended_(at<std::int64_t>(ended)) {
    if (slots < 1 || slots > kFewSlots || N < 1 || N > kMostEntries || B < 0) {
      throw std::invalid_argument("sizes out of range");
    }
    if (storage < 0 || storage > static_cast<int>(Storage::kFloat16)) {
      throw std::invalid_argument("storage out of range");
    }
    for (const Address one : {R, F, best, records, past, rows, done, wide ? ended : done}) {
      check_address(at<void>(one), B, "the history");
    }
    Ring& ring = call_.ring;
    ring.storage = static_cast<Storage>(storage), ring.slots = slots, ring.kind = static_cast<Kind>(kind);
    ring.eps = eps, ring.ridge = ridge, ring.damping = damping, ring.samples = B, ring.blocks = 1, ring.features = N;
    ring.sample_stride = N, ring.slot_stride = slot_stride, ring.R = at<void>(R), ring.F = at<void>(F);
    call_.rule = {safeguard, eps, divisor, static_cast<Norm>(norm)};
    call_.rtol = rtol, call_.atol = atol, call_.floor = floor, call_.N = N, call_.wide = wide;
    call_.rtols = at<const double>(rtols), call_.atols = at<const double>(atols);
    call_.best = at<void>(best), call_.records = at<FewRecord>(records), call_.past = at<FewPast>(past);
    call_.done = at<std::uint8_t>(done);
  }

  void set_tolerance(double rtol, double floor) { call_.rtol = rtol, call_.floor = floor; }

  // One step; returns how many samples run on. z_next is not read of the last one, where those end too. Where fn sees
  // the samples at hand alone, their next iterates close up in z_next; else it holds those that have finished, of which
  // it has `settled` already.
  std::int64_t step(Address f, Address z, Address z_next, std::int64_t settled, bool last, int threads) {
    FewCall call = call_;
    const std::int64_t entries = (call.wide ? B_ : n_) * call.N;
    call.f = at<const void>(f), call.z = at<const void>(z), call.z_next = at<void>(z_next);
    call.n = n_, call.rows = mapped_ ? rows_ : nullptr, call.last = last, call.threads = threads;
    check_address(call.f, entries, "f");
    check_address(call.z, entries, "z");
    if (!last) check_address(call.z_next, entries, "the next iterate");
    const Memory next = memory(call.ring, last ? nullptr : call.z_next, last ? 0 : entries);
    if (next.overlaps(memory(call.ring, call.f, entries)) || next.overlaps(memory(call.ring, call.z, entries))) {
      throw std::invalid_argument("the next iterate must share no memory with f and z");
    }
    if (call.wide && !last) settle(call.z_next, settled);
    call_.ring.head = call.ring.head = (call.ring.head + 1) % call.ring.slots;
    call_.evaluations = ++call.evaluations;
    if (few_pass()(call) > 0) close_up(call);
    return n_;
  }

  std::int64_t finished() const { return B_ - n_; }

  // What a solve returns of its B samples. Returns how many did not converge. A sample that no step has measured has
  // spent its budget.
  std::int64_t tell(Address residual, Address evaluations, Address status, Address rejections, Address rank_losses) {
    std::int64_t failed = 0;
    for (std::int64_t b = 0; b < B_; ++b) {
      const FewRecord s = record(b);
      const auto number = [&](FewField field) { return static_cast<std::int64_t>(field.of(s.counts)); };
      at<double>(residual)[b] = s.best;
      at<std::int64_t>(evaluations)[b] = number(kEvaluationsField);
      at<std::int64_t>(status)[b] = number(kStatusField) - 1;
      at<std::int64_t>(rejections)[b] = number(kRejectionsField);
      at<std::int64_t>(rank_losses)[b] = number(kRankLossesField);
      failed += number(kStatusField) - 1 != kConverged;
    }
    return failed;
  }

  // STALLED, not CONVERGED, where the tolerance met is below the rounding of f and z in a precision of `eps`.
  void doubt(double eps) {
    for (std::int64_t b = 0; b < B_; ++b) {
      FewRecord& s = call_.records[b];
      if (call_.evaluations == 0 || kStatusField.of(s.counts) != kConverged + 1) continue;
      const double tolerance = atol(b) + rtol(b) * s.size;
      const bool unresolved = tolerance > 0 && tolerance < eps / 2 * s.size;
      if (unresolved) s.counts += std::uint64_t{kStalled} << kStatusField.shift;
    }
  }

  // The records of all samples as judge.h has them, (B,).
  void records(Address table) const {
    for (std::int64_t b = 0; b < B_; ++b) {
      const FewRecord s = record(b);
      const FewPast past = call_.evaluations > 0 ? call_.past[b] : FewPast{INFINITY, 0, INFINITY, 0};
      const auto number = [&](FewField field) { return static_cast<double>(field.of(s.counts)); };
      Sample& out = at<Sample>(table)[b] = Sample{};
      out.best = s.best, out.size = s.size, out.residual = out.previous = s.previous;
      out.flat = number(kFlatField), out.steps = number(kFewStepsField), out.status = number(kStatusField) - 1;
      out.evaluations = number(kEvaluationsField), out.rejections = number(kRejectionsField);
      out.rank_losses = number(kRankLossesField), out.rtol = rtol(b), out.atol = atol(b);
      out.recent = past.recent, out.recent_size = past.recent_size;
      out.earlier = past.earlier, out.earlier_size = past.earlier_size;
      out.unknowns = call_.N, out.floor = call_.floor;
    }
  }

 private:
  double rtol(std::int64_t b) const { return call_.rtols ? call_.rtols[b] : call_.rtol; }
  double atol(std::int64_t b) const { return call_.atols ? call_.atols[b] : call_.atol; }
  FewRecord record(std::int64_t b) const {
    if (call_.evaluations > 0) return call_.records[b];
    return {INFINITY, INFINITY, 0, std::uint64_t{kMaxSteps + 1} << kStatusField.shift};
  }

  // Copies the best iterates of finished samples, but for the first `settled` of them, to z.
  void settle(void* z, std::int64_t settled) const {
    const std::int64_t bytes = call_.N * bytes_of(call_.ring.storage);
    for (std::int64_t i = settled; i < finished(); ++i) {
      std::memcpy(static_cast<char*>(z) + ended_[i] * bytes, static_cast<char*>(call_.best) + ended_[i] * bytes,
                  static_cast<std::size_t>(bytes));
    }
  }

  // Lets the finished samples go: those that run on keep their order.
  void close_up(const FewCall& call) {
    const std::int64_t bytes = call.N * bytes_of(call.ring.storage);
    char* const next = call.wide || call.last ? nullptr : static_cast<char*>(call.z_next);
    std::int64_t k = 0, gone = finished();
    for (std::int64_t i = 0; i < n_; ++i) {
      const std::int64_t row = mapped_ ? rows_[i] : i;
      if (call.done[i]) {
        if (call.wide) ended_[gone++] = row;
        continue;
      }
      if (next && k < i) std::memcpy(next + k * bytes, next + i * bytes, static_cast<std::size_t>(bytes));
      rows_[k++] = row;
    }
    n_ = k, mapped_ = true;
  }

  FewCall call_{};
  std::int64_t B_, n_;
  std::int64_t *rows_, *ended_;
  bool mapped_ = false;
};

}  // namespace
}  // namespace pydeqsolve
