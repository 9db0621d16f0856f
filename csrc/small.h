// Adjoint systems of a few unknowns, solved directly from their matrices. Nothing is kept of a sample between two
// calls: what is needed of its system is computed again from its g.
#pragma once
#include "krylov.h"

namespace pydeqsolve {

constexpr int kMostUnknowns = 4;

// g (B, N), N <= kMostUnknowns; mask (B,) or null: the samples asked for. eps: unit of rounding of Scalar.
template <class Scalar>
struct Small {
  std::int64_t B;
  int N;
  double eps;
  const Scalar* g;
  const std::uint8_t* mask;
  KrylovTolerance asked;
  int threads;
};

// The samples for which u = 0 does not do.
template <class Scalar>
std::int64_t small_active(const Small<Scalar>& c);
// Column j of I - A, to matrix (B, N, N), from the product A e_j (B, N).
template <class Scalar>
void small_column(const Small<Scalar>& c, int j, const Scalar* product, Scalar* matrix);
// u (B, N) of the scaled systems; where a matrix is not finite, singular or nearly so u is zero and unmet (B,) true,
// else false.
template <class Scalar>
void small_solve(const Small<Scalar>& c, const Scalar* matrix, Scalar* u, bool* unmet);
// Sets unmet for samples whose u misses what was asked for, or is not held exactly when it is scaled back. Returns the
// samples that are unmet.
template <class Scalar>
std::int64_t small_measure(const Small<Scalar>& c, const Scalar* u, const Scalar* product, bool* unmet);
// Writes what `judge_krylov` makes of u for the samples that are not unmet; `evaluations` products were made of active
// ones. Returns those of them asked for that failed.
template <class Scalar>
std::int64_t small_judge(const Small<Scalar>& c, const Scalar* u, const Scalar* product, const bool* unmet,
                         const KrylovJudgement& rule, int evaluations, std::int64_t* status, double* residual,
                         std::int64_t* counts);
// u times 2^exponent, in place; NaN where g is not finite.
template <class Scalar>
void small_raise(const Small<Scalar>& c, Scalar* u);
// values times 2^-exponent, in place; where they are not finite they become zero, and unmet true.
template <class Scalar>
void small_lower(const Small<Scalar>& c, Scalar* values, bool* unmet);

}  // namespace pydeqsolve
