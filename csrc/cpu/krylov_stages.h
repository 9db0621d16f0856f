// A pass over samples in stages, each of which sums over entries what the next one needs. Included by krylov_cpu.cpp
// alone, once per instruction set.
#pragma once
#include <cstdint>

#include "cpu/krylov_rows.h"
#include "cpu/parallel.h"
#include "krylov.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr std::int64_t kLong = 1 << 14;  // entries that one work item sums
constexpr int kStages = 3;

struct Shape {
  std::int64_t B, N, bytes;
  int threads;
  std::int64_t pieces() const { return N > kLong ? (N + kLong - 1) / kLong : 1; }
};
template <class Scalar>
Shape shape_of(const Krylov<Scalar>& c, std::int64_t words, int threads) {
  return {c.B, c.N, words * c.B * c.N * static_cast<std::int64_t>(sizeof(Scalar)), threads};
}

// Calls body(i, first, last, item) for every piece of every sample.
template <class Body>
void for_pieces(const Shape& s, const Body& body) {
  const std::int64_t pieces = s.pieces();
  parallel_for(s.B * pieces, s.bytes, s.threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t first = item % pieces * kLong;
      body(item / pieces, first, pieces == 1 || first + kLong > s.N ? s.N : first + kLong, item);
    }
  });
}

// How many numbers each stage of a pass makes of a sample; those of the first are maxima where `maxima`, else sums.
struct Stages {
  int numbers[kStages];
  bool maxima = false;
  int begin(int stage) const { return stage == 0 ? 0 : begin(stage - 1) + numbers[stage - 1]; }
  int width() const { return begin(kStages); }
};

// For every sample: stage(s, i, first, last, totals, own, sums) for the stages in turn, which writes its numbers of
// those entries to own (zero before) and finds the totals of the stages before it; then finish(i, totals), and
// write(i, first, last). sums: room for `scratch` sums. Long samples are cut into pieces.
template <class Stage, class Finish, class Write>
void for_samples(const Shape& shape, const Stages& stages, int scratch, const Stage& stage, const Finish& finish,
                 const Write& write) {
  const std::int64_t pieces = shape.pieces();
  const int width = stages.width();
  if (pieces == 1) {
    parallel_for(shape.B, shape.bytes, shape.threads, [&](std::int64_t begin, std::int64_t end) {
      Scratch totals(width);
      Sums sums(scratch);
      for (std::int64_t i = begin; i < end; ++i) {
        for (int j = 0; j < width; ++j) totals.data[j] = 0;
        for (int s = 0; s < kStages; ++s) {
          if (stages.numbers[s]) stage(s, i, 0, shape.N, totals.data, totals.data + stages.begin(s), sums);
        }
        finish(i, totals.data);
        write(i, 0, shape.N);
      }
    });
    return;
  }
  Scratch totals(shape.B * width);
  for (int s = 0; s < kStages; ++s) {
    const int numbers = stages.numbers[s];
    if (!numbers) continue;
    Scratch parts(shape.B * pieces * numbers);
    parallel_for(shape.B * pieces, shape.bytes, shape.threads, [&](std::int64_t begin, std::int64_t end) {
      Sums sums(scratch);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t i = item / pieces, first = item % pieces * kLong;
        stage(s, i, first, first + kLong > shape.N ? shape.N : first + kLong, totals.data + i * width,
              parts.data + item * numbers, sums);
      }
    });
    for (std::int64_t item = 0; item < shape.B * pieces; ++item) {
      double* const total = totals.data + item / pieces * width + stages.begin(s);
      for (int j = 0; j < numbers; ++j) {
        const double part = parts.data[item * numbers + j];
        total[j] = !(stages.maxima && s == 0) ? total[j] + part : total[j] > part ? total[j] : part;
      }
    }
  }
  for (std::int64_t i = 0; i < shape.B; ++i) finish(i, totals.data + i * width);
  for_pieces(shape,
             [&](std::int64_t i, std::int64_t first, std::int64_t last, std::int64_t) { write(i, first, last); });
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
