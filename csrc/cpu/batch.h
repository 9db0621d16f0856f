// One call's states and history on the CPU: where each block of a sample lies, and into which pieces it is cut.
// Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>

#include "core.h"
#include "cpu/rows.h"
#include "step.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr std::int64_t kPiece = 1 << 14;  // elements that one work item sums
constexpr std::int64_t kCache = 1 << 24;  // bytes; a step that moves more writes past the caches

// Where the values and the history of one block of those at hand lie.
struct Place {
  std::int64_t at;       // in counts, Gram matrices and right-hand sides
  std::int64_t state;    // in f and z, entries
  std::int64_t history;  // of slot 0 in R and F, entries
};

// One call's arrays as they are stored, and what follows from it.
template <class Scalar>
struct Batch {
  explicit Batch(const Call& c) : call(c) {}

  const Call& call;
  const Ring& ring = call.ring;
  Scalar *const R = static_cast<Scalar*>(ring.R), *const F = static_cast<Scalar*>(ring.F);
  const Scalar *const f = static_cast<const Scalar*>(call.f), *const z = static_cast<const Scalar*>(call.z);
  Scalar* const z_next = static_cast<Scalar*>(call.z_next);
  const std::int64_t T = ring.blocks, D = ring.features, blocks = call.n * T;
  const int M = ring.slots;
  const bool steps = ring.kind == Kind::kAndersonI || ring.kind == Kind::kBroydenGood;
  const std::int64_t pieces = D > kPiece ? (D + kPiece - 1) / kPiece : 1;
  const bool past_cache = bytes(2 * M) > kCache;

  std::int64_t sample(std::int64_t i) const { return call.rows ? call.rows[i] : i; }
  Place place(std::int64_t i, std::int64_t t) const {
    return {sample(i) * T + t, (i * T + t) * D, sample(i) * ring.sample_stride + t * D};
  }
  // From block (i, t) to the same of the sample that comes `later`.
  Ahead ahead(std::int64_t i, std::int64_t t, std::int64_t later) const {
    if (!past_cache || pieces > 1 || i + later >= call.n) return {};
    const Place here = place(i, t), there = place(i + later, t);
    return {there.state - here.state, there.history - here.history};
  }
  bool is_wanted(std::int64_t i, std::int64_t t) const { return !call.wanted || call.wanted[i * T + t]; }
  int older(const Place& at) const { return ring.count[at.at] < M - 1 ? ring.count[at.at] : M - 1; }
  std::int64_t row(const Place& at, int age) const {
    return at.history + slot_of(ring.head, age, M) * ring.slot_stride;
  }
  std::int64_t bytes(std::int64_t words) const {
    return words * blocks * D * static_cast<std::int64_t>(sizeof(Scalar));
  }
};

// Calls body(i, t, piece, first, last) for the pieces begin … end of all blocks.
template <class Scalar, class Body>
void for_pieces(const Batch<Scalar>& b, std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t block = item / b.pieces, first = item % b.pieces * kPiece;
    body(block / b.T, block % b.T, first, b.pieces == 1 || first + kPiece > b.D ? b.D : first + kPiece, item);
  }
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
