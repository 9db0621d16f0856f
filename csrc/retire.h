// Finished samples leave the batch, on the host: what they leave is stored, and those that run on close up. `_leave` of
// pydeqsolve/loop/step.py says the same in PyTorch. Included by bindings.cpp alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "judge.h"
#include "step.h"

namespace pydeqsolve {
namespace {

constexpr double kUnseen = 1e-160;  // root of a sum of squares that float64 rounds coarsely, or to zero
constexpr double kSmall = 1e-140;   // ||f|| of states of which less than kUnseen is more than rounding
constexpr double kGrown = 1e6;      // times its least: a residual that has diverged, where the budget ends

inline bool is_zero(const double* z, std::int64_t entries) {
  for (std::int64_t k = 0; k < entries; ++k) {
    if (z[k] != 0) return false;
  }
  return true;
}

// Stores iterate and record of each sample that has finished, or with `ended`, the budget spent, of all: z where that
// is its best, to best (B, T, D), and table (n,) to left (B,).
inline void leave(const Call& call, bool ended, Sample* left) {
  const Ring& ring = call.ring;
  const std::int64_t entries = ring.blocks * ring.features;
  const std::int64_t bytes = entries * bytes_of(ring.storage);
  const auto* const z = static_cast<const char*>(call.z);
  auto* const best = static_cast<char*>(call.best);
  parallel_for(call.n, call.n * bytes, call.threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      Sample& s = call.table[i];
      if (s.status == kRunning) {
        if (!ended) continue;
        s.status = s.previous > kGrown * s.best && s.previous < INFINITY ? kDiverged : kMaxSteps;
      }
      const std::int64_t sample = call.rows ? call.rows[i] : i;
      if (s.fresh != 0) std::memcpy(best + sample * bytes, z + i * bytes, bytes);
      // Squares of the residual asked for vanish where z is so small: that it was met is not known.
      const bool unseen = ring.storage == Storage::kFloat64 && call.rule.norm != Norm::kMax && s.status == kConverged &&
                          s.size < kSmall && s.atol + s.rtol * s.size < kUnseen && s.rtol < INFINITY;
      if (unseen && !is_zero(static_cast<const double*>(call.z) + i * entries, entries)) s.status = kStalled;
      left[sample] = s;
    }
  });
}

// Rows of `bytes` each, of the n samples at hand; where those of the samples that run on go.
struct Kept {
  const void* from;
  void* to;
  std::int64_t bytes;
};

// memcpy of a length that the compiler knows, where it is a usual one.
inline void copy(char* to, const char* from, std::int64_t bytes) {
  switch (bytes) {
    case 4:
      std::memcpy(to, from, 4);
      return;
    case 8:
      std::memcpy(to, from, 8);
      return;
    case 12:
      std::memcpy(to, from, 12);
      return;
    case 16:
      std::memcpy(to, from, 16);
      return;
    case sizeof(Sample):
      std::memcpy(to, from, sizeof(Sample));
      return;
    default:
      std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
}

// Copies the samples that run on, one after the other. Returns how many there are.
inline std::int64_t close_up(std::int64_t n, const Sample* table, int threads, const std::vector<Kept>& parts) {
  std::vector<std::int64_t> places;
  places.reserve(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    if (table[i].status == kRunning) places.push_back(i);
  }
  const auto k = static_cast<std::int64_t>(places.size());
  for (const Kept& part : parts) {
    const auto* const from = static_cast<const char*>(part.from);
    auto* const to = static_cast<char*>(part.to);
    parallel_for(k, k * part.bytes, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; ++j) {
        copy(to + j * part.bytes, from + places[static_cast<std::size_t>(j)] * part.bytes, part.bytes);
      }
    });
  }
  return k;
}

// What a solve returns of its B samples. Returns how many did not converge.
inline std::int64_t tell(std::int64_t B, const Sample* left, double* residual, std::int64_t* evaluations,
                         std::int64_t* status, std::int64_t* rejections, std::int64_t* rank_losses) {
  std::int64_t failed = 0;
  for (std::int64_t i = 0; i < B; ++i) {
    const Sample& s = left[i];
    residual[i] = s.best;
    evaluations[i] = static_cast<std::int64_t>(s.evaluations);
    status[i] = static_cast<std::int64_t>(s.status);
    rejections[i] = static_cast<std::int64_t>(s.rejections);
    rank_losses[i] = static_cast<std::int64_t>(s.rank_losses);
    failed += s.status != kConverged;
  }
  return failed;
}

}  // namespace
}  // namespace pydeqsolve
