// What the CPU step does to one block of a sample: measures it, or mixes its next iterate; whole or a piece at a time.
// Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "core.h"
#include "cpu/batch.h"
#include "cpu/mix.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "judge.h"
#include "step.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

// Adds up one piece of a block, entries first … last, and writes its newest rows.
template <class Scalar>
void measure_one(const Batch<Scalar>& b, const Place& at, std::int64_t first, std::int64_t last, Ahead ahead,
                 const Dots& dots) {
  const Norm norm = b.call.rule.norm;
  const int older = b.older(at);
  const auto fill = [&](Scalar** R, Scalar** F) {
    for (int a = 0; a <= older; ++a) {
      const std::int64_t row = b.row(at, a) + first;
      R[a] = b.R + row;
      F[a] = b.F + row;
    }
  };
  const Scalar *const f = b.f + at.state + first, *const z = b.z + at.state + first;
  if (norm != Norm::kMax && older <= most_older(b.steps) && is_long<Scalar>(last - first)) {
    RowsOf<Scalar> rows;
    fill(rows.R, rows.F);
    const int kinds = b.steps ? 4 : 2;
    double sums[4 * kMaxOlder + 2];
    for (int k = 0; k < kinds * older + 2; ++k) sums[k] = 0;
    const double before = b.ring.squares[2 * at.at];
    if (b.steps ? measure_piece<Scalar, true>(last - first, older, f, z, rows, ahead, b.past_cache, before, sums)
                : measure_piece<Scalar, false>(last - first, older, f, z, rows, ahead, b.past_cache, before, sums)) {
      for (int a = 0; a < older; ++a) {
        (b.steps ? dots.gram_column(a) : dots.gram_row(a)) += sums[a];
        dots.rhs(a) += sums[older + a];
        if (!b.steps) continue;
        dots.gram_row(a) += sums[2 * older + a];
        dots.steps_row(a) += sums[3 * older + a];
      }
      dots.squares(0) += sums[kinds * older];
      dots.squares(1) += sums[kinds * older + 1];
      return;
    }
  }
  Scalar *R[kMaxSlots], *F[kMaxSlots];
  fill(R, F);
  for (std::int64_t k = 0; k < last - first; k += kTile) {
    const int length = last - first - k < kTile ? static_cast<int>(last - first - k) : kTile;
    measure_tile(length, older, b.steps, norm, f + k, z + k, R, F, dots);
    for (int a = 0; a <= older; ++a) R[a] += kTile, F[a] += kTile;
  }
}

// Moves the summed dots of one block into the history and its norms (2,).
template <class Scalar>
void finish_block(const Batch<Scalar>& b, const Place& place, const Dots& dots, double* norms) {
  const Ring& ring = b.ring;
  const int M = b.M;
  const std::int64_t at = place.at;
  const int older = b.older(place);
  double* gram = ring.gram + at * M * M;
  double* steps_gram = ring.steps_gram ? ring.steps_gram + at * M * M : nullptr;
  for (int a = 0; a < older; ++a) {
    const int slot = slot_of(ring.head, a, M);
    gram[ring.head * M + slot] = dots.gram_row(a);
    gram[slot * M + ring.head] = b.steps ? dots.gram_column(a) : dots.gram_row(a);
    ring.rhs[at * M + a] = dots.rhs(a);
    if (steps_gram) steps_gram[ring.head * M + slot] = steps_gram[slot * M + ring.head] = dots.steps_row(a);
  }
  for (int which = 0; which < 2; ++which) {
    const double squares = ring.squares[2 * at + which] = dots.squares(which);
    norms[which] = b.call.rule.norm != Norm::kMax ? squares : is_finite(squares) ? dots.largest(which) : squares;
  }
  ring.count[at] = older + 1;
}

// A block of one piece, from its rows to its norms (2,). One that is not wanted loses its history: its rows would no
// longer be consecutive.
template <class Scalar>
void measure_block(const Batch<Scalar>& b, std::int64_t i, std::int64_t t, double* norms) {
  const Place at = b.place(i, t);
  if (!b.is_wanted(i, t)) {
    b.ring.count[at.at] = 0;
    return;
  }
  double own[Dots::size(kMaxSlots)];
  std::memset(own, 0, Dots::size(b.M) * sizeof(double));
  const Dots dots{b.M, own};
  measure_one(b, at, 0, b.D, b.ahead(i, t, 1), dots);
  finish_block(b, at, dots, norms);
}

// Entries first … last of one block's next iterate; gamma (M,) and mode are the block's, newest_f (D,) its row f_0.
template <class Scalar>
void mix_one(const Batch<Scalar>& b, const Place& at, std::int64_t first, std::int64_t last, const double* gamma,
             std::uint8_t mode, const Scalar* newest_f, Ahead ahead) {
  const Scalar* const z = b.z + at.state;
  Scalar* const z_next = b.z_next + at.state;
  if (mode == kKeep) {
    std::memcpy(z_next + first, z + first, (last - first) * sizeof(Scalar));
    return;
  }
  const double undamped = mode == kAccept ? 0 : 1 - b.ring.damping;
  const int newest = mode == kReject ? 1 : 0;
  const int differences = mode == kMix && b.ring.count[at.at] > 1 ? b.ring.count[at.at] - 1 : 0;
  const auto f_row = [&](int age) { return age == 0 ? newest_f : b.F + b.row(at, age); };
  if (undamped == 0 && differences <= kMaxOlder) {
    const Scalar* F[kMaxOlder + 1];
    for (int a = 0; a <= differences; ++a) F[a] = f_row(newest + a) + first;
    mix_piece(last - first, differences, ahead, b.past_cache, F, gamma, z_next + first);
    return;
  }
  const auto r_row = [&](int age) { return b.R + b.row(at, age); };
  alignas(64) double x[kTile], newer[kTile], next[kTile];
  for (std::int64_t from = first; from < last; from += kTile) {
    const int length = last - from < kTile ? static_cast<int>(last - from) : kTile;
    read_tile(length, f_row(newest) + from, x);
    if (undamped != 0) {
      read_tile(length, r_row(newest) + from, newer);
      for (int k = 0; k < length; ++k) x[k] -= undamped * newer[k];
    }
    for (int a = 0; a < differences; ++a) {
      const double w = gamma[a];
      if (w == 0) continue;
      read_tile(length, f_row(a) + from, newer);
      read_tile(length, f_row(a + 1) + from, next);
      for (int k = 0; k < length; ++k) x[k] -= w * (newer[k] - next[k]);
      if (undamped == 0) continue;
      read_tile(length, r_row(a) + from, newer);
      read_tile(length, r_row(a + 1) + from, next);
      for (int k = 0; k < length; ++k) x[k] += w * undamped * (newer[k] - next[k]);
    }
    write_tile(length, x, z_next + from);
  }
}

// Copies entries first … last of block (i, t) of the iterate before, where it is left behind as its sample's best.
template <class Scalar>
void keep_best(const Batch<Scalar>& b, const Sample& sample, std::int64_t i, std::int64_t t, std::int64_t first,
               std::int64_t last) {
  if (b.call.best == nullptr || sample.left_behind == 0) return;
  const Place at = b.place(i, t);
  std::memcpy(static_cast<Scalar*>(b.call.best) + at.at * b.D + first,
              static_cast<const Scalar*>(b.call.before) + at.state + first, (last - first) * sizeof(Scalar));
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
