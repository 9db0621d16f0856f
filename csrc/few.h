// Solves of a few unknowns a sample, side by side. Of a sample that runs on, 64 bytes are kept besides its rows: the
// Gram matrix is made again at each step from the differences of the rows, which are fewer words than it has, and what
// is constant in a solve or the same for all samples lies with neither.
//
// Newest difference first, no more than N of them are independent, N the unknowns: once so many have been taken the
// rest would be dropped as dependent, so neither their rows nor their products are looked at.
#pragma once
#include "step.h"

namespace pydeqsolve {

constexpr int kMostEntries = 4;            // of a sample
constexpr int kFewSlots = 17;              // M at most
constexpr std::int64_t kFewSteps = 65535;  // that a record can count

// What is known of a sample, from step to step and when it has finished.
struct FewRecord {
  double best, previous, size;  // of judge.h; previous of a finished sample is its residual as last measured
  std::uint64_t counts;
};

// The fields of FewRecord::counts: since the last restart, up to 127; flat; status + 1; and over all steps.
struct FewField {
  int shift;
  std::uint64_t mask;
  std::uint64_t of(std::uint64_t counts) const { return counts >> shift & mask; }
};
constexpr FewField kFewStepsField{0, 127}, kFlatField{7, 63}, kStatusField{13, 7}, kRejectionsField{16, 65535},
    kRankLossesField{32, 65535}, kEvaluationsField{48, 65535};

// The least residual and its size at the last two powers of two of the evaluations.
struct FewPast {
  double recent, recent_size, earlier, earlier_size;
};

// One step of the n samples `rows`. N entries a sample; wide: f, z and z_next hold all B samples, those that have
// finished as `best` has them; else the n at hand, in their order.
struct FewCall {
  Ring ring;  // R, F (B, N) a slot; of the rest what the small systems need: no Gram matrices
  Rule rule;
  double rtol, atol;
  const double *rtols, *atols;  // (B,) or null
  double floor;
  int N;
  std::int64_t n, evaluations;  // of every sample at hand, this one included
  const std::int64_t* rows;     // (n,), or null for all
  bool wide, last;              // last: no step follows; what still runs has spent its budget
  const void *f, *z;
  void* z_next;
  void* best;          // (B, N)
  FewRecord* records;  // (B,), nothing of which is read in the first evaluation
  FewPast* past;       // (B,)
  std::uint8_t* done;  // (n,) receives which samples have finished
  int threads;
};

// Returns how many samples have finished.
using FewPass = std::int64_t (*)(const FewCall&);
FewPass few_pass();

}  // namespace pydeqsolve
