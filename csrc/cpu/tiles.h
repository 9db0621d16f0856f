// The general pass over the rows: any memory, kind and norm. A tile of each difference is formed in L1, then
// multiplied. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "core.h"
#include "cpu/loads.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr int kTile = 512;  // elements whose differences stay in L1

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

inline void track(double x, double& largest) {
  const double size = magnitude(x);
  if (!(size <= largest)) largest = size;
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
  static constexpr int size(int ages) { return 4 * ages + 4; }
  void add(const Dots& other) const {
    for (int k = 0; k < 4 * ages + 2; ++k) row[k] += other.row[k];
    for (int which = 0; which < 2; ++which) track(other.largest(which), largest(which));
  }
};

// One vector as doubles.
inline void put(double* out, const Lanes& v) { write<false>(out, v); }
inline void put(double* out, const FloatLanes& v) { write<false>(out, widen(v)); }
inline void put(double* out, const Floats& v) {
  write<false>(out, lower(v));
  write<false>(out + kLanes, upper(v));
}

// The entries of one tile of a row as doubles, in the order in which loads bring them: the same for every row.
template <class Scalar>
inline void read_tile(int length, const Scalar* row, double* out) {
  int i = 0;
  for (; i + kChunk<Scalar> <= length; i += kChunk<Scalar>) {
    for (int part = 0; part < kParts<Scalar>; ++part) put(out + i + part * kWidth<Scalar>, read(row + i, part));
  }
  for (; i < length; ++i) out[i] = static_cast<Wide<Scalar>>(row[i]);
}

template <class Scalar>
inline void write_tile(int length, const double* x, Scalar* out) {
  int i = 0;
  for (; i + kChunk<Scalar> <= length; i += kChunk<Scalar>) {
    WideLanes<Scalar> parts[kParts<Scalar>];
    for (int part = 0; part < kParts<Scalar>; ++part) {
      const double* from = x + i + part * kWidth<Scalar>;
      if constexpr (std::is_same_v<WideLanes<Scalar>, Floats>) {
        parts[part] = paired(read(from), read(from + kLanes));
      } else {
        parts[part] = converted<WideLanes<Scalar>>(read(from));
      }
    }
    write<false>(out + i, joined<Scalar>(parts));
  }
  for (; i < length; ++i) out[i] = static_cast<Scalar>(static_cast<Wide<Scalar>>(x[i]));
}

// r = f - z of one tile, and R, which is r as the ring keeps it.
template <class Scalar>
inline void residual_tile(int length, const Scalar* f, const Scalar* z, Scalar* R, double* r) {
  int i = 0;
  for (; i + kChunk<Scalar> <= length; i += kChunk<Scalar>) {
    WideLanes<Scalar> parts[kParts<Scalar>];
    for (int part = 0; part < kParts<Scalar>; ++part) {
      parts[part] = read(f + i, part) - read(z + i, part);
      put(r + i + part * kWidth<Scalar>, parts[part]);
    }
    write<false>(R + i, joined_residuals<Scalar>(parts));
  }
  for (; i < length; ++i) {
    const Wide<Scalar> wide = static_cast<Wide<Scalar>>(f[i]) - static_cast<Wide<Scalar>>(z[i]);
    R[i] = kept<Scalar>(wide);
    r[i] = wide;
  }
}

// One tile: writes r and f into the ring, adds to the dots. R and F hold `older + 1` row pointers, newest first.
template <class Scalar>
void measure_tile(int length, int older, bool steps, Norm norm, const Scalar* f, const Scalar* z, Scalar* const* R,
                  Scalar* const* F, const Dots& dots) {
  // Zero padding to whole lanes leaves every sum unchanged.
  alignas(64) double r0[kTile], y0[kTile], s0[kTile], ra[kTile], za[kTile], y[kTile], s[kTile];
  const int padded = (length + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  for (double* buffer : {r0, y0, s0, ra, za, y, s}) {
    for (int i = length; i < padded; ++i) buffer[i] = 0;
  }
  residual_tile(length, f, z, R[0], s);
  std::memcpy(F[0], f, length * sizeof(Scalar));
  read_tile(length, f, y);
  dots.squares(0) += dot(padded, s, s);
  dots.squares(1) += dot(padded, y, y);
  if (norm == Norm::kMax) {
    for (int i = 0; i < length; ++i) {
      track(s[i], dots.largest(0));
      track(y[i], dots.largest(1));
    }
  }
  read_tile(length, R[0], r0);
  for (int i = 0; i < length; ++i) {
    ra[i] = r0[i];
    za[i] = y[i] - r0[i];
  }
  for (int a = 0; a < older; ++a) {
    alignas(64) double next[kTile];
    read_tile(length, R[a + 1], next);
    for (int i = 0; i < length; ++i) {
      y[i] = ra[i] - next[i];
      ra[i] = next[i];
    }
    if (steps) {
      read_tile(length, F[a + 1], next);
      for (int i = 0; i < length; ++i) {
        next[i] -= ra[i];
        s[i] = za[i] - next[i];
        za[i] = next[i];
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

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
