// The CPU step. This file is compiled once per instruction set (PYDEQSOLVE_ISA names the namespace); dispatch.cpp
// chooses at run time. Everything here has internal linkage or lies in that namespace, so that the linker cannot
// replace a function of the portable build by its AVX-512 twin.
//
// Sums are formed in double: lanes of a tile, tiles of a piece, pieces of a block, always in that order, so the bits
// depend on the instruction set but never on the number of threads or on the other samples.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#ifndef PYDEQSOLVE_ISA
#define PYDEQSOLVE_ISA portable
#endif

#include "core.h"
#include "lanes.h"
#include "parallel.h"
#include "step.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr int kTile = 512;                // elements whose differences stay in L1
constexpr std::int64_t kPiece = 1 << 14;  // elements that one work item sums
constexpr std::int64_t kCache = 1 << 24;  // bytes; a step that moves more writes past the caches

struct Buffer {  // doubles, zeroed
  explicit Buffer(std::int64_t n) : data(static_cast<double*>(std::calloc(n > 0 ? n : 1, sizeof(double)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  double* data;
};

// u.v over one tile, padded alike.
inline double dot(int length, const double* u, const double* v) {
  Lanes even = {}, odd = {};
  for (int i = 0; i < length; i += 2 * kLanes) {
    even += read(u + i) * read(v + i);
    odd += read(u + i + kLanes) * read(v + i + kLanes);
  }
  return sum_lanes(even + odd);
}

// x.u and x.v over one tile of `length` elements (padded with zeros to a multiple of 2 kLanes).
inline void two_dots(int length, const double* x, const double* u, const double* v, double* xu, double* xv) {
  Lanes u0 = {}, u1 = {}, v0 = {}, v1 = {};
  for (int i = 0; i < length; i += 2 * kLanes) {
    const Lanes x0 = read(x + i), x1 = read(x + i + kLanes);
    u0 += x0 * read(u + i);
    u1 += x1 * read(u + i + kLanes);
    v0 += x0 * read(v + i);
    v1 += x1 * read(v + i + kLanes);
  }
  *xu += sum_lanes(u0 + u1);
  *xv += sum_lanes(v0 + v1);
}

// What one piece of one block adds up: offsets into a row of `dots_per_item` doubles.
struct Dots {
  int ages;  // capacity M
  double* row;
  double& gram_row(int a) const { return row[a]; }              // w_0 . y_a
  double& gram_column(int a) const { return row[ages + a]; }    // w_a . y_0
  double& rhs(int a) const { return row[2 * ages + a]; }        // w_a . r_0
  double& steps_row(int a) const { return row[3 * ages + a]; }  // s_0 . s_a
  double& squares(int which) const { return row[4 * ages + which]; }
  double& largest(int which) const { return row[4 * ages + 2 + which]; }
  static int size(int ages) { return 4 * ages + 4; }
};

inline void track(double x, double& largest) {
  const double size = magnitude(x);
  if (!(size <= largest)) largest = size;
}

// One tile: writes r and f into the ring, adds to the dots. r and fv hold `older + 1` row pointers, newest first.
template <class Scalar>
void measure_tile(int length, int older, bool steps, Norm norm, const Scalar* f, const Scalar* z, Scalar* const* R,
                  Scalar* const* F, const Dots& dots) {
  // Zero padding to whole lanes leaves every sum unchanged.
  alignas(64) double r0[kTile], y0[kTile], s0[kTile], ra[kTile], za[kTile], y[kTile], s[kTile];
  const int padded = (length + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  for (double* buffer : {r0, y0, s0, ra, za, y, s}) {
    for (int i = length; i < padded; ++i) buffer[i] = 0;
  }
  for (int i = 0; i < length; ++i) {
    const Scalar r = f[i] - z[i];
    R[0][i] = r;
    F[0][i] = f[i];
    r0[i] = ra[i] = r;
    za[i] = z[i];
    y[i] = f[i];
  }
  dots.squares(0) += dot(padded, r0, r0);
  dots.squares(1) += dot(padded, y, y);
  if (norm == Norm::kMax) {
    for (int i = 0; i < length; ++i) {
      track(r0[i], dots.largest(0));
      track(y[i], dots.largest(1));
    }
  }
  for (int a = 0; a < older; ++a) {
    for (int i = 0; i < length; ++i) {
      const double next = R[a + 1][i];
      y[i] = ra[i] - next;
      ra[i] = next;
    }
    if (steps) {
      for (int i = 0; i < length; ++i) {
        const double next = static_cast<double>(F[a + 1][i]) - ra[i];
        s[i] = za[i] - next;
        za[i] = next;
      }
    }
    if (a == 0) {
      std::memcpy(y0, y, padded * sizeof(double));
      if (steps) std::memcpy(s0, s, padded * sizeof(double));
    }
    if (!steps) {
      two_dots(padded, y, y0, r0, &dots.gram_row(a), &dots.rhs(a));
    } else {
      two_dots(padded, s, y0, r0, &dots.gram_column(a), &dots.rhs(a));
      two_dots(padded, s0, y, s, &dots.gram_row(a), &dots.steps_row(a));
    }
  }
}

// A whole piece by the register kernels: the part in whole vectors where it lies, the rest through padded copies.
template <class Scalar>
void measure_piece(std::int64_t length, int older, const Scalar* f, const Scalar* z, Scalar* const* R, Scalar* F,
                   const Dots& dots) {
  double sums[2 * kMaxOlder + 2] = {};
  const std::int64_t whole = length / kLanes * kLanes;
  const Scalar* rows[kMaxOlder + 1];
  for (int a = 0; a < older; ++a) rows[a] = R[a + 1];
  measure_rows_of<Scalar>(older, whole, f, z, R[0], F, rows, sums);
  if (whole < length) {
    Scalar padded[kMaxOlder + 5][kLanes] = {};
    const std::size_t bytes = (length - whole) * sizeof(Scalar);
    std::memcpy(padded[kMaxOlder + 1], f + whole, bytes);
    std::memcpy(padded[kMaxOlder + 2], z + whole, bytes);
    for (int a = 0; a < older; ++a) {
      std::memcpy(padded[a], rows[a] + whole, bytes);
      rows[a] = padded[a];
    }
    measure_rows_of<Scalar>(older, kLanes, padded[kMaxOlder + 1], padded[kMaxOlder + 2], padded[kMaxOlder + 3],
                            padded[kMaxOlder + 4], rows, sums);
    std::memcpy(R[0] + whole, padded[kMaxOlder + 3], bytes);
    std::memcpy(F + whole, padded[kMaxOlder + 4], bytes);
  }
  for (int a = 0; a < older; ++a) {
    dots.gram_row(a) += sums[a];
    dots.rhs(a) += sums[older + a];
  }
  dots.squares(0) += sums[2 * older];
  dots.squares(1) += sums[2 * older + 1];
}

template <class Scalar>
void mix_piece(std::int64_t length, int differences, bool past_cache, const Scalar** rows, const double* weight,
               Scalar* out) {
  const std::int64_t whole = length / kLanes * kLanes;
  if (past_cache && is_aligned(out)) {
    mix_rows_of<Scalar, true>(differences, whole, rows, weight, out);
  } else {
    mix_rows_of<Scalar, false>(differences, whole, rows, weight, out);
  }
  if (whole == length) return;
  Scalar padded[kMaxOlder + 2][kLanes] = {};
  const std::size_t bytes = (length - whole) * sizeof(Scalar);
  for (int a = 0; a <= differences; ++a) {
    std::memcpy(padded[a], rows[a] + whole, bytes);
    rows[a] = padded[a];
  }
  mix_rows_of<Scalar, false>(differences, kLanes, rows, weight, padded[kMaxOlder + 1]);
  std::memcpy(out + whole, padded[kMaxOlder + 1], bytes);
}

std::int64_t sample_of(const Rows& rows, std::int64_t i) { return rows.rows ? rows.rows[i] : i; }
bool is_wanted(const Rows& rows, std::int64_t i, std::int64_t t) {
  return !rows.wanted || rows.wanted[i * rows.blocks + t];
}

// Moves the summed dots of one block into the history and the norms.
template <class Scalar>
void store_dots(const History<Scalar>& h, std::int64_t block, int older, bool steps, const Dots& dots, Norm norm,
                double* norms) {
  const int M = h.slots;
  double* gram = h.gram + block * M * M;
  double* steps_gram = h.steps_gram ? h.steps_gram + block * M * M : nullptr;
  for (int a = 0; a < older; ++a) {
    const int slot = slot_of(h.head, a, M);
    gram[h.head * M + slot] = dots.gram_row(a);
    gram[slot * M + h.head] = steps ? dots.gram_column(a) : dots.gram_row(a);
    h.rhs[block * M + a] = dots.rhs(a);
    if (steps_gram) steps_gram[h.head * M + slot] = steps_gram[slot * M + h.head] = dots.steps_row(a);
  }
  for (int which = 0; which < 2; ++which) {
    const double squares = h.squares[2 * block + which] = dots.squares(which);
    const bool finite = squares - squares == 0;
    norms[which] = norm == Norm::kSquares ? squares : finite ? dots.largest(which) : squares;
  }
}

}  // namespace

template <class Scalar>
void measure(const Rows& rows, const History<Scalar>& h, const Scalar* f, const Scalar* z, double* norms, Norm norm,
             int threads) {
  const std::int64_t T = rows.blocks, D = rows.features;
  const int M = h.slots;
  const bool steps = h.kind == Kind::kAndersonI || h.kind == Kind::kBroydenGood;
  const std::int64_t pieces = D > kPiece ? (D + kPiece - 1) / kPiece : 1;
  const std::int64_t width = Dots::size(M), blocks = rows.n * T;
  const std::int64_t bytes = blocks * D * (M + 3) * static_cast<std::int64_t>(sizeof(Scalar));
  Buffer partial(pieces > 1 ? blocks * pieces * width : 0);

  const auto older_of = [&](std::int64_t at) { return h.count[at] < M - 1 ? h.count[at] : M - 1; };
  const auto finish = [&](std::int64_t block, std::int64_t at, const Dots& dots) {
    const int older = older_of(at);
    store_dots(h, at, older, steps, dots, norm, norms + 2 * block);
    h.count[at] = older + 1;
  };
  parallel_for(blocks * pieces, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    Scalar *R[kMaxSlots], *F[kMaxSlots];
    double own[Dots::size(kMaxSlots)];
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t block = item / pieces, i = block / T, t = block % T;
      const std::int64_t sample = sample_of(rows, i), at = sample * T + t;
      if (!is_wanted(rows, i, t)) {
        if (pieces == 1) h.count[at] = 0;  // its rows would no longer be consecutive
        continue;
      }
      const int older = older_of(at);
      const std::int64_t first = item % pieces * kPiece, last = first + kPiece < D ? first + kPiece : D;
      const Dots dots{M, pieces > 1 ? partial.data + item * width : own};
      if (pieces == 1) std::memset(own, 0, width * sizeof(double));
      for (int a = 0; a <= older; ++a) {
        const std::int64_t offset = ((sample * M + slot_of(h.head, a, M)) * T + t) * D + first;
        R[a] = h.R + offset;
        F[a] = h.F + offset;
      }
      if (T == 1 && D <= kShortRow && item + 1 < end) prefetch(h.R + sample_of(rows, i + 1) * M * D, M * D);
      const Scalar *f_here = f + block * D + first, *z_here = z + block * D + first;
      if (!steps && norm == Norm::kSquares && older <= kMaxOlder) {
        measure_piece(last - first, older, f_here, z_here, R, F[0], dots);
      } else {
        for (std::int64_t k = 0; k < last - first; k += kTile) {
          const int length = last - first - k < kTile ? static_cast<int>(last - first - k) : kTile;
          measure_tile(length, older, steps, norm, f_here + k, z_here + k, R, F, dots);
          for (int a = 0; a <= older; ++a) R[a] += kTile, F[a] += kTile;
        }
      }
      if (pieces == 1) finish(block, at, dots);
    }
  });
  if (pieces == 1) return;

  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t i = block / T, t = block % T, at = sample_of(rows, i) * T + t;
    if (!is_wanted(rows, i, t)) {
      h.count[at] = 0;
      continue;
    }
    const Dots dots{M, partial.data + block * pieces * width};
    for (std::int64_t p = 1; p < pieces; ++p) {
      const Dots more{M, dots.row + p * width};
      for (int k = 0; k < 4 * M + 2; ++k) dots.row[k] += more.row[k];
      for (int which = 0; which < 2; ++which) track(more.largest(which), dots.largest(which));
    }
    finish(block, at, dots);
  }
}

template <class Scalar>
void weights(const Rows& rows, const History<Scalar>& h, Coupling coupling, double ridge, const std::uint8_t* mode,
             double* gamma, std::int32_t* dropped, int threads) {
  const std::int64_t T = rows.blocks;
  const int M = h.slots, n = M - 1;
  const std::int64_t bytes = rows.n * T * M * M * 16;
  parallel_for(rows.n, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    Buffer workspace(2 * (n * n + n) + n);
    double *sum = workspace.data, *sum_rhs = sum + n * n, *A = sum_rhs + n, *b = A + n * n, *scale = b + n;
    double squares[2];
    int order[kMaxSlots];
    const auto restart = [&] {
      std::memset(sum, 0, (n * n + n) * sizeof(double));
      squares[0] = squares[1] = 0;
    };
    const auto add = [&](std::int64_t sample, std::int64_t t) {
      const std::int64_t at = sample * T + t;
      add_block(n, h.count[at] - 1, h.head, M, h.kind, h.gram + at * M * M,
                h.steps_gram ? h.steps_gram + at * M * M : nullptr, h.rhs + at * M, sum, sum_rhs);
      squares[0] += h.squares[2 * at];
      squares[1] += h.squares[2 * at + 1];
    };
    const auto solve = [&](int size, std::int64_t block) {
      for (int i = 0; i < size; ++i) {
        b[i] = sum_rhs[i];
        for (int j = 0; j < size; ++j) A[i * size + j] = sum[i * n + j];
      }
      dropped[block] = solve_system(h.kind, size, A, b, scale, order, ridge, squares, h.eps);
      for (int a = 0; a < M; ++a) gamma[block * M + a] = a < size ? b[a] : 0;
    };
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t sample = sample_of(rows, i);
      restart();
      int size = 0;
      for (std::int64_t t = 0; t < T; ++t) {
        const std::int64_t block = i * T + t;
        dropped[block] = 0;
        if (mode[block] == kReject) h.count[sample * T + t] = 0;  // mix reads the counts of kMix blocks alone
        if (mode[block] == kPlain) h.count[sample * T + t] = 1;
        if (mode[block] != kMix) continue;
        if (coupling == Coupling::kIndependent) restart();
        add(sample, t);
        const int differences = h.count[sample * T + t] - 1;
        size = differences > size ? differences : size;
        if (coupling != Coupling::kJoint) solve(differences, block);
      }
      if (coupling != Coupling::kJoint) continue;
      for (std::int64_t t = 0, first = -1; t < T; ++t) {
        const std::int64_t block = i * T + t;
        if (mode[block] != kMix) continue;
        if (first < 0) {
          first = block;
          solve(size, block);
        } else {
          std::memcpy(gamma + block * M, gamma + first * M, M * sizeof(double));
          dropped[block] = dropped[first];
        }
      }
    }
  });
}

template <class Scalar>
void mix(const Rows& rows, const History<Scalar>& h, const double* gamma, const std::uint8_t* mode, double beta,
         const Scalar* z, Scalar* z_next, int threads) {
  const std::int64_t T = rows.blocks, D = rows.features;
  const int M = h.slots;
  const std::int64_t pieces = D > kPiece ? (D + kPiece - 1) / kPiece : 1;
  const std::int64_t bytes = rows.n * T * D * (M + 1) * static_cast<std::int64_t>(sizeof(Scalar));
  parallel_for(rows.n * T * pieces, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) double x[kTile];
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t block = item / pieces, i = block / T, t = block % T, sample = sample_of(rows, i);
      const std::int64_t first = item % pieces * kPiece, last = first + kPiece < D ? first + kPiece : D;
      const std::uint8_t what = mode[block];
      if (what == kKeep) {
        std::memcpy(z_next + block * D + first, z + block * D + first, (last - first) * sizeof(Scalar));
        continue;
      }
      const double undamped = what == kAccept ? 0 : 1 - beta;
      const int newest = what == kReject ? 1 : 0;
      const int differences = what == kMix ? h.count[sample * T + t] - 1 : 0;
      const double* weight = gamma + block * M;
      if (undamped == 0 && differences <= kMaxOlder) {
        const Scalar* F[kMaxOlder + 1];
        if (T == 1 && D <= kShortRow && item + 1 < end) prefetch(h.F + sample_of(rows, i + 1) * M * D, M * D);
        for (int a = 0; a <= differences; ++a) {
          F[a] = h.F + ((sample * M + slot_of(h.head, newest + a, M)) * T + t) * D + first;
        }
        mix_piece(last - first, differences, bytes > kCache, F, weight, z_next + block * D + first);
        continue;
      }
      for (std::int64_t at = first; at < last; at += kTile) {
        const int length = last - at < kTile ? static_cast<int>(last - at) : kTile;
        const auto row = [&](const Scalar* base, int age) {
          return base + ((sample * M + slot_of(h.head, age, M)) * T + t) * D + at;
        };
        const Scalar* f = row(h.F, newest);
        for (int k = 0; k < length; ++k) x[k] = f[k];
        if (undamped != 0) {
          const Scalar* r = row(h.R, newest);
          for (int k = 0; k < length; ++k) x[k] -= undamped * r[k];
        }
        for (int a = 0; a < differences; ++a) {
          if (weight[a] == 0) continue;
          const Scalar *newer = row(h.F, a), *older = row(h.F, a + 1);
          const double w = weight[a];
          for (int k = 0; k < length; ++k) {
            x[k] -= w * (static_cast<double>(newer[k]) - static_cast<double>(older[k]));
          }
          if (undamped == 0) continue;
          const Scalar *newer_r = row(h.R, a), *older_r = row(h.R, a + 1);
          for (int k = 0; k < length; ++k) {
            x[k] += w * undamped * (static_cast<double>(newer_r[k]) - static_cast<double>(older_r[k]));
          }
        }
        Scalar* out = z_next + block * D + at;
        for (int k = 0; k < length; ++k) out[k] = static_cast<Scalar>(x[k]);
      }
    }
    fence();
  });
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                               \
  template void measure<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, double*, Norm,    \
                                int);                                                                                \
  template void weights<Scalar>(const Rows&, const History<Scalar>&, Coupling, double, const std::uint8_t*, double*, \
                                std::int32_t*, int);                                                                 \
  template void mix<Scalar>(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, double,         \
                            const Scalar*, Scalar*, int);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
