// The CPU step. This file is compiled once per instruction set (PYDEQSOLVE_ISA names the namespace); dispatch.cpp
// chooses at run time. Everything here has internal linkage or lies in that namespace, so that the linker cannot
// replace a function of the portable build by its AVX-512 twin.
//
// Sums are formed in double: lanes of a line or tile, lines of a piece, pieces of a block, always in that order, so the
// bits depend on the instruction set but never on the number of threads or on the other samples.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef PYDEQSOLVE_ISA
#define PYDEQSOLVE_ISA portable
#endif

#include "core.h"
#include "judge.h"
#include "parallel.h"
#include "rows.h"
#include "step.h"
#include "systems.h"
#include "tiles.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr std::int64_t kPiece = 1 << 14;  // elements that one work item sums
constexpr std::int64_t kCache = 1 << 24;  // bytes; a step that moves more writes past the caches
constexpr std::int64_t kSample =
    1 << 18;  // bytes of rows of a sample that stay in a core's own cache from pass to pass

template <class T>
struct Buffer {  // zeroed
  explicit Buffer(std::int64_t n) : data(static_cast<T*>(std::calloc(n > 0 ? n : 1, sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data;
};

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
    return {sample(i) * T + t, (i * T + t) * D, (sample(i) * M * T + t) * D};
  }
  // From block (i, t) to the same of the sample that comes `later`.
  Ahead ahead(std::int64_t i, std::int64_t t, std::int64_t later) const {
    if (!past_cache || pieces > 1 || i + later >= rows.n) return {};
    const Block here = block(i, t), there = block(i + later, t);
    return {there.state - here.state, there.history - here.history};
  }
  bool is_wanted(std::int64_t i, std::int64_t t) const { return !rows.wanted || rows.wanted[i * T + t]; }
  int older(const Block& at) const { return h.count[at.at] < M - 1 ? h.count[at.at] : M - 1; }
  std::int64_t row(const Block& at, int age) const { return at.history + slot_of(h.head, age, M) * T * D; }
  std::int64_t bytes(std::int64_t words) const {
    return words * blocks * D * static_cast<std::int64_t>(sizeof(Scalar));
  }
};

// Adds up one piece of a block, entries first … last, and writes its newest rows. f, z (n, T, D).
template <class Scalar>
void measure_one(const Batch<Scalar>& b, const Block& at, std::int64_t first, std::int64_t last, const Scalar* f,
                 const Scalar* z, Norm norm, Ahead ahead, const Dots& dots) {
  const int older = b.older(at);
  Scalar *R[kMaxSlots], *F[kMaxSlots];
  for (int a = 0; a <= older; ++a) {
    const std::int64_t row = b.row(at, a) + first;
    R[a] = b.h.R + row;
    F[a] = b.h.F + row;
  }
  f += at.state + first;
  z += at.state + first;
  if (!b.steps && norm == Norm::kSquares && older <= kMaxOlder) {
    double sums[2 * kMaxOlder + 2] = {};
    measure_piece(last - first, older, f, z, R, F[0], ahead, b.past_cache, sums);
    for (int a = 0; a < older; ++a) {
      dots.gram_row(a) += sums[a];
      dots.rhs(a) += sums[older + a];
    }
    dots.squares(0) += sums[2 * older];
    dots.squares(1) += sums[2 * older + 1];
    return;
  }
  for (std::int64_t k = 0; k < last - first; k += kTile) {
    const int length = last - first - k < kTile ? static_cast<int>(last - first - k) : kTile;
    measure_tile(length, older, b.steps, norm, f + k, z + k, R, F, dots);
    for (int a = 0; a <= older; ++a) R[a] += kTile, F[a] += kTile;
  }
}

// Moves the summed dots of one block into the history and its norms (2,).
template <class Scalar>
void finish_block(const Batch<Scalar>& b, const Block& block, const Dots& dots, Norm norm, double* norms) {
  const History<Scalar>& h = b.h;
  const int M = b.M;
  const std::int64_t at = block.at;
  const int older = b.older(block);
  double* gram = h.gram + at * M * M;
  double* steps_gram = h.steps_gram ? h.steps_gram + at * M * M : nullptr;
  for (int a = 0; a < older; ++a) {
    const int slot = slot_of(h.head, a, M);
    gram[h.head * M + slot] = dots.gram_row(a);
    gram[slot * M + h.head] = b.steps ? dots.gram_column(a) : dots.gram_row(a);
    h.rhs[at * M + a] = dots.rhs(a);
    if (steps_gram) steps_gram[h.head * M + slot] = steps_gram[slot * M + h.head] = dots.steps_row(a);
  }
  for (int which = 0; which < 2; ++which) {
    const double squares = h.squares[2 * at + which] = dots.squares(which);
    const bool finite = squares - squares == 0;
    norms[which] = norm == Norm::kSquares ? squares : finite ? dots.largest(which) : squares;
  }
  h.count[at] = older + 1;
}

// A block of one piece, from its rows to its norms (2,). One that is not wanted loses its history: its rows would no
// longer be consecutive.
template <class Scalar>
void measure_block(const Batch<Scalar>& b, std::int64_t i, std::int64_t t, const Scalar* f, const Scalar* z, Norm norm,
                   double* norms) {
  const Block at = b.block(i, t);
  if (!b.is_wanted(i, t)) {
    b.h.count[at.at] = 0;
    return;
  }
  double own[Dots::size(kMaxSlots)];
  std::memset(own, 0, Dots::size(b.M) * sizeof(double));
  const Dots dots{b.M, own};
  measure_one(b, at, 0, b.D, f, z, norm, b.ahead(i, t, 1), dots);
  finish_block(b, at, dots, norm, norms);
}

// Entries first … last of one block's next iterate; gamma (M,) and mode are the block's, newest_f (D,) its row f_0.
template <class Scalar>
void mix_one(const Batch<Scalar>& b, const Block& at, std::int64_t first, std::int64_t last, const double* gamma,
             std::uint8_t mode, double beta, const Scalar* newest_f, Ahead ahead, const Scalar* z, Scalar* z_next) {
  z += at.state;
  z_next += at.state;
  if (mode == kKeep) {
    std::memcpy(z_next + first, z + first, (last - first) * sizeof(Scalar));
    return;
  }
  const double undamped = mode == kAccept ? 0 : 1 - beta;
  const int newest = mode == kReject ? 1 : 0;
  const int differences = mode == kMix && b.h.count[at.at] > 1 ? b.h.count[at.at] - 1 : 0;
  const auto f_row = [&](int age) { return age == 0 ? newest_f : b.h.F + b.row(at, age); };
  if (undamped == 0 && differences <= kMaxOlder) {
    const Scalar* F[kMaxOlder + 1];
    for (int a = 0; a <= differences; ++a) F[a] = f_row(newest + a) + first;
    mix_piece(last - first, differences, ahead, b.past_cache, F, gamma, z_next + first);
    return;
  }
  const auto r_row = [&](int age) { return b.h.R + b.row(at, age); };
  alignas(64) double x[kTile];
  for (std::int64_t from = first; from < last; from += kTile) {
    const int length = last - from < kTile ? static_cast<int>(last - from) : kTile;
    const Scalar *f = f_row(newest) + from, *r = r_row(newest) + from;
    for (int k = 0; k < length; ++k) x[k] = f[k];
    for (int k = 0; undamped != 0 && k < length; ++k) x[k] -= undamped * r[k];
    for (int a = 0; a < differences; ++a) {
      const double w = gamma[a];
      if (w == 0) continue;
      const Scalar *newer = f_row(a) + from, *older = f_row(a + 1) + from;
      for (int k = 0; k < length; ++k) x[k] -= w * (static_cast<double>(newer[k]) - static_cast<double>(older[k]));
      if (undamped == 0) continue;
      newer = r_row(a) + from, older = r_row(a + 1) + from;
      for (int k = 0; k < length; ++k) {
        x[k] += w * undamped * (static_cast<double>(newer[k]) - static_cast<double>(older[k]));
      }
    }
    for (int k = 0; k < length; ++k) z_next[from + k] = static_cast<Scalar>(x[k]);
  }
}

// Calls body(i, t, piece, first, last) for the pieces begin … end of all blocks.
template <class Scalar, class Body>
void for_pieces(const Batch<Scalar>& b, std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t block = item / b.pieces, first = item % b.pieces * kPiece;
    body(block / b.T, block % b.T, first, b.pieces == 1 || first + kPiece > b.D ? b.D : first + kPiece, item);
  }
}

}  // namespace

template <class Scalar>
void measure(const Rows& rows, const History<Scalar>& h, const Scalar* f, const Scalar* z, double* norms, Norm norm,
             int threads) {
  const Batch<Scalar> b{rows, h};
  const std::int64_t width = Dots::size(b.M);
  Buffer<double> partial(b.pieces > 1 ? b.blocks * b.pieces * width : 0);
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 3), threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto item) {
      if (b.pieces == 1) {
        measure_block(b, i, t, f, z, norm, norms + 2 * item);
      } else if (b.is_wanted(i, t)) {
        measure_one(b, b.block(i, t), first, last, f, z, norm, {}, Dots{b.M, partial.data + item * width});
      }
    });
    fence();
  });
  for (std::int64_t block = 0; b.pieces > 1 && block < b.blocks; ++block) {
    const Block at = b.block(block / b.T, block % b.T);
    if (!b.is_wanted(block / b.T, block % b.T)) {
      h.count[at.at] = 0;
      continue;
    }
    const Dots dots{b.M, partial.data + block * b.pieces * width};
    for (std::int64_t p = 1; p < b.pieces; ++p) dots.add(Dots{b.M, dots.row + p * width});
    finish_block(b, at, dots, norm, norms + 2 * block);
  }
}

template <class Scalar>
void weights(const Rows& rows, const History<Scalar>& h, Coupling coupling, double ridge, const std::uint8_t* mode,
             double* gamma, std::int32_t* dropped, int threads) {
  const Batch<Scalar> b{rows, h};
  parallel_for(rows.n, b.blocks * b.M * b.M * 16, threads, [&](std::int64_t begin, std::int64_t end) {
    Systems<Scalar> systems(h, coupling, ridge, b.T);
    std::int64_t samples[kLanes];
    for (std::int64_t i = begin; i < end; i += systems.group()) {
      const int k = static_cast<int>(end - i < systems.group() ? end - i : systems.group());
      for (int j = 0; j < k; ++j) samples[j] = b.sample(i + j);
      systems.solve(k, samples, mode + i * b.T, gamma + i * b.T * b.M, dropped + i * b.T);
    }
  });
}

template <class Scalar>
void mix(const Rows& rows, const History<Scalar>& h, const double* gamma, const std::uint8_t* mode, double beta,
         const Scalar* z, Scalar* z_next, int threads) {
  const Batch<Scalar> b{rows, h};
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 1), threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto) {
      const Block at = b.block(i, t);
      const std::int64_t block = i * b.T + t;
      mix_one(b, at, first, last, gamma + block * b.M, mode[block], beta, h.F + b.row(at, 0), b.ahead(i, t, 1), z,
              z_next);
    });
    fence();
  });
}

template <class Scalar>
Counts step(const Rows& rows, const History<Scalar>& h, const Scalar* f, const Scalar* z, const Judgement& rule,
            Record* table, const Update& update, std::uint8_t* mode, Scalar* z_next, int threads) {
  const Batch<Scalar> b{rows, h};
  const Norm norm = rule.is_max ? Norm::kMax : Norm::kSquares;
  const std::int64_t T = b.T, M = b.M;
  const std::int64_t sample_bytes = 2 * M * T * b.D * static_cast<std::int64_t>(sizeof(Scalar));
  if (b.pieces > 1 || sample_bytes > kSample || sample_bytes == 0) {
    Buffer<double> norms(2 * b.blocks), gamma(b.blocks * M);
    Buffer<std::int32_t> dropped(b.blocks);
    measure<Scalar>(rows, h, f, z, norms.data, norm, threads);
    const Counts counts = judge_all(rows.n, T, norms.data, nullptr, table, rule, mode);
    weights<Scalar>(rows, h, update.coupling, update.ridge, mode, gamma.data, dropped.data, threads);
    for (std::int64_t i = 0; i < rows.n; ++i) count_losses(table[i], T, dropped.data + i * T);
    mix<Scalar>(rows, h, gamma.data, mode, update.beta, z, z_next, threads);
    return counts;
  }
  std::atomic<std::int64_t> finished{0}, left_behind{0};
  parallel_for(rows.n, b.bytes(2 * M + 3), threads, [&](std::int64_t begin, std::int64_t end) {
    Systems<Scalar> systems(h, update.coupling, update.ridge, T);
    const std::int64_t fit = kSample / sample_bytes, group = fit < systems.group() ? fit : systems.group();
    Buffer<double> norms(2 * group * T), gamma(group * T * M);
    Buffer<std::int32_t> dropped(group * T);
    std::int64_t samples[kLanes];
    Counts own{0, 0};
    for (std::int64_t i = begin; i < end; i += group) {
      const int k = static_cast<int>(end - i < group ? end - i : group);
      std::memset(norms.data, 0, 2 * k * T * sizeof(double));
      for (std::int64_t j = 0; j < k; ++j) {
        samples[j] = b.sample(i + j);
        for (std::int64_t t = 0; t < T; ++t) measure_block(b, i + j, t, f, z, norm, norms.data + 2 * (j * T + t));
      }
      const Counts some = judge_all(k, T, norms.data, nullptr, table + i, rule, mode + i * T);
      own.finished += some.finished;
      own.left_behind += some.left_behind;
      systems.solve(k, samples, mode + i * T, gamma.data, dropped.data);
      for (std::int64_t j = 0; j < k; ++j) {
        count_losses(table[i + j], T, dropped.data + j * T);
        for (std::int64_t t = 0; t < T; ++t) {
          const Block at = b.block(i + j, t);
          mix_one(b, at, 0, b.D, gamma.data + (j * T + t) * M, mode[(i + j) * T + t], update.beta, f + at.state,
                  b.ahead(i + j, t, group), z, z_next);
        }
      }
    }
    finished += own.finished;
    left_behind += own.left_behind;
    fence();
  });
  return {finished, left_behind};
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                               \
  template void measure<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, double*, Norm,    \
                                int);                                                                                \
  template void weights<Scalar>(const Rows&, const History<Scalar>&, Coupling, double, const std::uint8_t*, double*, \
                                std::int32_t*, int);                                                                 \
  template void mix<Scalar>(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, double,         \
                            const Scalar*, Scalar*, int);                                                            \
  template Counts step<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, const Judgement&,  \
                               Record*, const Update&, std::uint8_t*, Scalar*, int);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
