// The small least-squares problems min |beta e_1 - H y| of a Krylov cycle, a Hessenberg matrix per sample, column by
// column (Saad & Schultz 1986). pydeqsolve/derivative/krylov.py says the same in PyTorch.
#pragma once
#include <cmath>

#include "krylov_sample.h"

namespace pydeqsolve {

// Column j of sample i: j + 1 entries of the triangle, cosine, sine, and the right-hand side.
PYDEQSOLVE_HD static inline double* column_of(double* const* columns, std::int64_t i, int j) {
  return columns[j] + i * (j + 4);
}

// Takes in column k, h (k + 1) with s.below under it, to column (k + 4); h is overwritten. rotation(j): cosine and sine
// of column j < k. A column that adds nothing but rounding to the span is not taken: its coordinate would be of the
// size of 1/eps. Says in s.going whether another one is wanted.
template <class Rotation>
PYDEQSOLVE_HD static inline void take_column(KrylovSample& s, const Rotation& rotation, double* column, int k,
                                             double* h, double eps) {
  double size = 0;
  for (int j = 0; j <= k; ++j) size += h[j] * h[j];
  size = square_root(size);
  ++s.used;
  if (!(s.below + size < INFINITY)) {
    s.broken = true, s.going = false;
    return;
  }
  for (int j = 0; j < k; ++j) {
    const double* const turn = rotation(j);
    const double upper = turn[0] * h[j] + turn[1] * h[j + 1];
    h[j + 1] = turn[0] * h[j + 1] - turn[1] * h[j];
    h[j] = upper;
  }
  const double radius = hypot(h[k], s.below), whole = hypot(size, s.below);
  if (!(radius > 4 * eps * whole)) {
    s.going = false;
    return;
  }
  if (s.sound == k && radius > square_root(eps) * whole) ++s.sound;
  ++s.taken;
  for (int j = 0; j < k; ++j) column[j] = h[j];
  column[k] = radius;
  const double cosine = column[k + 1] = h[k] / radius, sine = column[k + 2] = s.below / radius;
  column[k + 3] = cosine * s.left;
  s.left *= -sine;
  // Nothing left of a vector (a breakdown) ends the cycle; whether with an answer the true residual tells.
  s.going = magnitude(s.left) > 0.5 * s.pursued && s.below > eps * size;
}

// The same from the components of w in k + 1 vectors: h of the first time, `again` (k + 1) and squares = w . w of the
// second, `rest` the squares after that. Where `again` is but rounding nothing was subtracted.
template <class Rotation>
PYDEQSOLVE_HD static inline void take_components(KrylovSample& s, const Rotation& rotation, double* column, int k,
                                                 double* h, const double* again, double squares, double rest,
                                                 double eps) {
  s.below = square_root(is_rounding(k + 1, again, squares, eps) ? squares : rest);
  for (int j = 0; j <= k; ++j) h[j] += again[j];
  take_column(s, rotation, column, k, h, eps);
}

// The minimiser over the first `count` columns of sample i, to y. Returns its length.
static inline double coordinates(double* const* columns, std::int64_t i, int count, double* y) {
  for (int j = 0; j < count; ++j) y[j] = column_of(columns, i, j)[j + 3];
  for (int j = count - 1; j >= 0; --j) {
    const double* const column = column_of(columns, i, j);
    y[j] /= column[j];
    for (int l = 0; l < j; ++l) y[l] -= y[j] * column[l];
  }
  double squares = 0;
  for (int j = 0; j < count; ++j) squares += y[j] * y[j];
  return std::sqrt(squares);
}

// Leaves out of the sound columns those with which the minimiser is huge: together they nearly lose a direction, of
// which their diagonal need not tell. y (s.taken).
static inline void leave_out_weak(KrylovSample& s, double* const* columns, std::int64_t i, double eps, double* y) {
  const double most = s.best / std::sqrt(eps);
  while (s.sound > 0 && !(coordinates(columns, i, s.sound, y) <= most)) --s.sound;
}

}  // namespace pydeqsolve
