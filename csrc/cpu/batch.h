// One call's rows and history on the CPU: where each block of a sample lies, and into which pieces it is cut. Included
// by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>

#include "core.h"
#include "cpu/rows.h"
#include "step.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr std::int64_t kPiece = 1 << 14;  // elements that one work item sums
constexpr std::int64_t kCache = 1 << 24;  // bytes; a step that moves more writes past the caches

// One block of those at hand: where its values and its history lie.
struct Block {
  std::int64_t at;       // in counts, Gram matrices and right-hand sides
  std::int64_t state;    // in f and z, entries
  std::int64_t history;  // of slot 0 in R and F, entries
};

// One call's rows and history, and what follows from them.
template <class Scalar>
struct Batch {
  const Rows& rows;
  const History<Scalar>& h;
  const std::int64_t T = rows.blocks, D = rows.features, blocks = rows.n * T;
  const int M = h.slots;
  const bool steps = h.kind == Kind::kAndersonI || h.kind == Kind::kBroydenGood;
  const std::int64_t pieces = D > kPiece ? (D + kPiece - 1) / kPiece : 1;
  const bool past_cache = bytes(2 * M) > kCache;

  std::int64_t sample(std::int64_t i) const { return rows.rows ? rows.rows[i] : i; }
  Block block(std::int64_t i, std::int64_t t) const {
    return {sample(i) * T + t, (i * T + t) * D, sample(i) * h.sample_stride + t * D};
  }
  // From block (i, t) to the same of the sample that comes `later`.
  Ahead ahead(std::int64_t i, std::int64_t t, std::int64_t later) const {
    if (!past_cache || pieces > 1 || i + later >= rows.n) return {};
    const Block here = block(i, t), there = block(i + later, t);
    return {there.state - here.state, there.history - here.history};
  }
  bool is_wanted(std::int64_t i, std::int64_t t) const { return !rows.wanted || rows.wanted[i * T + t]; }
  int older(const Block& at) const { return h.count[at.at] < M - 1 ? h.count[at.at] : M - 1; }
  std::int64_t row(const Block& at, int age) const { return at.history + slot_of(h.head, age, M) * h.slot_stride; }
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
