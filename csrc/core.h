// Host and device mathematics of the small systems: M gamma = w.r with M at most memory x memory.
//
// All four methods are one update, z' = f - sum_a gamma_a (f_a - f_{a+1}), and differ in the matrix only
// (Y = residual differences, S = iterate differences, columns by age, a < b means a is newer):
//   Anderson II   (Y'Y) gamma = Y'r        Walker & Ni 2011, Eq. 2.2
//   Anderson I    (S'Y) gamma = S'r        Fang & Saad 2009
//   Broyden good  (S'Y + striu(S'S)) gamma = S'r   the compact form of Byrd, Nocedal & Schnabel 1994, Thm 6.1,
//                                          from B_0 = -I; dropping the oldest pair is deleting its row
//   Broyden bad   tril(Y'Y) gamma = Y'r    likewise for the inverse update
// The Gram holds differences that were formed before they were multiplied: w_a . y_b from raw Gram entries would lose
// all digits once the residual changes slowly.
#pragma once
#include "step.h"

namespace pydeqsolve {

PYDEQSOLVE_HD static inline int slot_of(int head, int age, int slots) {
  const int slot = head - age;
  return slot < 0 ? slot + slots : slot;
}

// Entry (i, j), by age, of one block's matrix.
PYDEQSOLVE_HD static inline double system_entry(Kind kind, int i, int j, int head, int slots, const double* gram,
                                                const double* steps_gram) {
  if (kind == Kind::kBroydenBad && i < j) return 0;
  const int at = slot_of(head, i, slots) * slots + slot_of(head, j, slots);
  return kind == Kind::kBroydenGood && i < j ? gram[at] + steps_gram[at] : gram[at];
}

// Adds one block's contribution to the system of size n: A (n, n) row-major, b (n,). A block with fewer differences
// than the system counts as zero in the others, which keeps a sum of positive matrices positive.
PYDEQSOLVE_HD static inline void add_block(int n, int differences, int head, int slots, Kind kind, const double* gram,
                                           const double* steps_gram, const double* rhs, double* A, double* b) {
  const int k = differences < n ? differences : n;
  for (int i = 0; i < k; ++i) {
    b[i] += rhs[i];
    for (int j = 0; j < k; ++j) A[i * n + j] += system_entry(kind, i, j, head, slots, gram, steps_gram);
  }
}

PYDEQSOLVE_HD static inline double magnitude(double x) { return x < 0 ? -x : x; }
PYDEQSOLVE_HD static inline double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// Solves the symmetric positive semidefinite A x = b by Cholesky, in place, newest difference first; returns the rank
// kept. A is scaled to a unit diagonal first, so `ridge` and `cutoff` are relative: multiplying the problem by any
// power of two changes no bit of the result. A difference that depends on newer ones (pivot <= cutoff) gets weight 0,
// as does one that is not finite: its scale is 0. Number is double, or a vector of doubles with as many systems side by
// side; root is its square root. Rows of zeros at the end of a system change no bit of the rest.
template <class Number, class Root>
PYDEQSOLVE_HD static inline Number solve_positive(int n, Number* A, Number* b, Number* scale, double ridge,
                                                  double cutoff, const Root& root) {
  const Number zero{};
  for (int i = 0; i < n; ++i) {
    const auto positive = A[i * n + i] > zero;
    scale[i] = positive ? 1.0 / root(A[i * n + i]) : zero;
  }
  for (int i = 0; i < n; ++i) {
    b[i] *= scale[i];
    for (int j = 0; j <= i; ++j) {
      const Number factor = scale[i] * scale[j];
      A[i * n + j] = factor > zero ? A[i * n + j] * factor : zero;  // 0 times infinity is NaN
    }
  }
  // L replaces A row by row, with 1 / L_jj on the diagonal; a dropped row is all zeros and so takes no further part.
  Number rank = zero;
  for (int j = 0; j < n; ++j) {
    Number pivot = A[j * n + j] + ridge;
    for (int k = 0; k < j; ++k) {
      Number sum = A[j * n + k];
      for (int i = 0; i < k; ++i) sum -= A[j * n + i] * A[k * n + i];
      A[j * n + k] = sum * A[k * n + k];
      pivot -= A[j * n + k] * A[j * n + k];
    }
    const auto kept = (scale[j] > zero) & (pivot > zero + cutoff);  // false for NaN too
    const Number inverse = 1.0 / root(pivot);
    A[j * n + j] = kept ? inverse : zero;
    for (int k = 0; k < j; ++k) A[j * n + k] = kept ? A[j * n + k] : zero;
    Number sum = kept ? b[j] : zero;
    for (int k = 0; k < j; ++k) sum -= A[j * n + k] * b[k];
    b[j] = sum * A[j * n + j];
    rank += kept ? zero + 1.0 : zero;
  }
  for (int j = n - 1; j >= 0; --j) {
    Number sum = b[j];
    for (int k = j + 1; k < n; ++k) sum -= A[k * n + j] * b[k];
    b[j] = sum * A[j * n + j];
  }
  for (int j = 0; j < n; ++j) b[j] *= scale[j];
  return rank;
}

PYDEQSOLVE_HD static inline bool is_finite(double x) { return x - x == 0; }

// Leaves the differences whose diagonal entry is not finite out of A x = b, by zeros; false when others are not either.
PYDEQSOLVE_HD static inline bool leave_out_infinite(int n, double* A, double* b) {
  for (int i = 0; i < n; ++i) {
    if (is_finite(A[i * n + i])) continue;
    for (int j = 0; j < n; ++j) A[i * n + j] = A[j * n + i] = 0;
    b[i] = 0;
  }
  double sum = 0;
  for (int i = 0; i < n * n; ++i) sum += A[i] - A[i];
  for (int i = 0; i < n; ++i) sum += b[i] - b[i];
  return sum == 0;
}

// Solves the general A x = b by elimination with complete pivoting after scaling rows, then columns, to a largest
// entry of one; returns the rank at which pivots fall to `cutoff`. Differences that are not finite get weight 0. order
// (n,) is workspace.
PYDEQSOLVE_HD static inline int solve_general(int n, double* A, double* b, double* scale, int* order, double cutoff) {
  if (!leave_out_infinite(n, A, b)) {
    for (int i = 0; i < n; ++i) b[i] = 0;
    return 0;
  }
  for (int i = 0; i < n; ++i) {
    double largest = 0;
    for (int j = 0; j < n; ++j) largest = magnitude(A[i * n + j]) > largest ? magnitude(A[i * n + j]) : largest;
    const double factor = largest > 0 ? 1 / largest : 0;
    for (int j = 0; j < n; ++j) A[i * n + j] *= factor;
    b[i] *= factor;
  }
  for (int j = 0; j < n; ++j) {
    double largest = 0;
    for (int i = 0; i < n; ++i) largest = magnitude(A[i * n + j]) > largest ? magnitude(A[i * n + j]) : largest;
    scale[j] = largest > 0 ? 1 / largest : 0;
    for (int i = 0; i < n; ++i) A[i * n + j] *= scale[j];
    order[j] = j;
  }
  int rank = 0;
  for (; rank < n; ++rank) {
    int row = rank, column = rank;
    double largest = -1;
    for (int i = rank; i < n; ++i) {
      for (int j = rank; j < n; ++j) {
        if (magnitude(A[i * n + j]) > largest) {
          largest = magnitude(A[i * n + j]);
          row = i;
          column = j;
        }
      }
    }
    if (!(largest > cutoff)) break;
    for (int j = 0; j < n; ++j) {
      const double t = A[rank * n + j];
      A[rank * n + j] = A[row * n + j];
      A[row * n + j] = t;
    }
    const double t = b[rank];
    b[rank] = b[row];
    b[row] = t;
    for (int i = 0; i < n; ++i) {
      const double u = A[i * n + rank];
      A[i * n + rank] = A[i * n + column];
      A[i * n + column] = u;
    }
    const int o = order[rank];
    order[rank] = order[column];
    order[column] = o;
    for (int i = rank + 1; i < n; ++i) {
      const double factor = A[i * n + rank] / A[rank * n + rank];
      for (int j = rank + 1; j < n; ++j) A[i * n + j] -= factor * A[rank * n + j];
      b[i] -= factor * b[rank];
    }
  }
  for (int i = rank - 1; i >= 0; --i) {
    for (int j = i + 1; j < rank; ++j) b[i] -= A[i * n + j] * b[j];
    b[i] /= A[i * n + i];
  }
  for (int i = rank; i < n; ++i) b[i] = 0;
  // x[order[i]] = b[i]: follow the permutation in place.
  for (int i = 0; i < n; ++i) {
    while (order[i] != i) {
      const int to = order[i];
      const double t = b[to];
      b[to] = b[i];
      b[i] = t;
      order[i] = order[to];
      order[to] = to;
    }
  }
  for (int j = 0; j < n; ++j) b[j] *= scale[j];
  return rank;
}

// Relative size at which a pivot counts as zero: a little above the rounding of a double precision Gram.
constexpr double kPivotCutoff = 1e-14;

constexpr double kNoise = 16;  // units of rounding of f that a difference may consist of

// Whether weights say anything. Differences carry the rounding of f, about eps |f|; weights so large that they raise it
// to the size of the residual itself do not (a residual that does not change leads there), and then all are left out.
// rr and ff: squares of r and of f, summed as the system was.
template <class Number>
PYDEQSOLVE_HD static inline auto is_sound(int n, const Number* weights, Number rr, Number ff, double eps) {
  Number largest{};
  for (int i = 0; i < n; ++i) {
    const Number size = weights[i] < Number{} ? -weights[i] : weights[i];
    largest = size <= largest ? largest : size;
  }
  const Number noise = kNoise * eps * largest;
  return noise * noise * ff <= rr;
}

struct Root {
  PYDEQSOLVE_HD double operator()(double x) const { return square_root(x); }
};

// Solves for the weights, which replace b; returns how many differences were left out.
PYDEQSOLVE_HD static inline int solve_system(Kind kind, int n, double* A, double* b, double* scale, int* order,
                                             double ridge, const double* squares, double eps) {
  const int rank = kind == Kind::kAndersonII
                       ? static_cast<int>(solve_positive(n, A, b, scale, ridge, kPivotCutoff, Root()))
                       : solve_general(n, A, b, scale, order, kPivotCutoff);
  if (is_sound(n, b, squares[0], squares[1], eps)) return n - rank;
  for (int i = 0; i < n; ++i) b[i] = 0;
  return n;
}

}  // namespace pydeqsolve
