// The adjoint systems u = g + A u of B samples with N entries each: what host code and kernels share. A is known by its
// products alone; GMRES finds each sample's u in cycles of at most `most` of them (pydeqsolve/derivative/gmres.py).
//
// Everything is computed for g times 2^-exponent, whose largest entry is in [1/2, 1): neither products nor squares
// overflow or vanish then, whatever the scale of g. Vectors q_j are orthonormal; column j of the Hessenberg matrix of a
// sample is kept as rotations make it triangular.
#pragma once
#include <cstdint>

namespace pydeqsolve {

// What is known of one sample's system.
struct KrylovSample {
  double norm;     // |g|, scaled; 1 where it is zero
  double goal;     // |g + A u - u| that was asked for
  double pursued;  // the same, but no less than products resolve
  double best;     // |g + A u - u| of u; infinite where a product was not finite
  double length;   // |u|
  double left;     // residual that the columns taken leave, signed
  double below;    // length of the newest vector before it was normalised
  std::int32_t exponent;
  std::int32_t taken;  // columns of this cycle
  std::int32_t sound;  // those that nearly lose no direction
  std::int32_t used;   // products of this cycle
  std::int32_t evaluations;
  std::int32_t ended;  // status of the solve, before u was scaled back
  bool out;            // not asked for: u = 0
  bool lost;           // g is not finite
  bool active;         // goes into a next cycle
  bool going;          // takes a next product in this one
  bool broken;         // a product of this cycle was not finite
  bool stalled;        // a cycle brought next to nothing
  bool told;           // `ended` is what another method said of its u
  bool changed;        // its dtype does not hold u as it was
  std::int8_t chosen;  // which of two u has replaced the last one, 0 for none
};

// What the products' precision, and who chose the tolerance, make of the outcome: `AdjointSolve` in PyTorch.
struct KrylovJudgement {
  bool adjoint;  // else the outcome is that of GMRES alone
  bool follows;  // the tolerance was left to the library
  double eps;    // unit of rounding of the products
};
// Status of one sample, whose residual is raised to what is known of it.
int judge_krylov(KrylovSample& s, const KrylovJudgement& rule);
// Writes status, |g + A u - u| / |g| and products of each sample, (B,). Returns the samples asked for that failed.
std::int64_t judge_krylov(std::int64_t B, KrylovSample* samples, const KrylovJudgement& rule, std::int64_t* status,
                          double* residual, std::int64_t* evaluations);

// One solve. vectors: q_0 ... q_k, (B, N) each. columns: of column j, (B, j + 4): the triangle's j + 1 entries, cosine
// and sine of the rotation, and what the triangle times the coordinates is to be.
template <class Scalar>
struct Krylov {
  std::int64_t B, N;
  double eps;       // unit of rounding of Scalar
  const Scalar* g;  // (B, N)
  KrylovSample* samples;
  Scalar* const* vectors;
  double* const* columns;
};

struct KrylovTolerance {
  double rtol, atol;
  const double *rtols, *atols;  // (B,) or null
  double eps;                   // unit of rounding of the products
};

// What another method says of the u that it has found, (B,) each; it is measured where `residual` is null.
struct KrylovTold {
  const double* residual;  // |g + A u - u|, scaled
  const std::int64_t *evaluations, *status;
  std::int64_t calls;  // products of each sample where `evaluations` is null
};

// What the passes on the CPU do; each returns a number of samples.
template <class Scalar>
struct KrylovPasses {
  // Scales g, forgets samples where mask (B,) is false, starts q_0. Returns the active ones.
  std::int64_t (*begin)(const Krylov<Scalar>&, const std::uint8_t* mask, const KrylovTolerance&, Scalar* q0,
                        int threads);
  // Takes in the product A q_k: orthogonalises q_k - A q_k twice, adds column k; `next` becomes q_{k+1}, zero for
  // samples that have ended their cycle. Returns those that go on.
  std::int64_t (*append)(const Krylov<Scalar>&, int k, const Scalar* product, Scalar* next, int threads);
  // out = u + sum y_j q_j for the coordinates y of least residual, over the sound columns alone where `cautious`; u is
  // null in the first cycle. Returns the samples with columns that are not sound.
  std::int64_t (*combine)(const Krylov<Scalar>&, bool cautious, const Scalar* u, Scalar* out, int threads);
  // Measures u_1 and, where given, u_2, by their products; a sample's better one replaces its u if it is better still.
  // u may be u_1 itself (first cycle). Starts q_0 of the next cycle. Returns the active ones.
  std::int64_t (*accept)(const Krylov<Scalar>&, const Scalar* u1, const Scalar* product1, const Scalar* u2,
                         const Scalar* product2, Scalar* u, Scalar* q0, int threads);
  // u times 2^exponent, in place, after the solve has ended. Returns the samples for which that is not exact.
  std::int64_t (*raise)(const Krylov<Scalar>&, Scalar* u, int threads);
  // values times 2^-exponent, in place; a sample whose values are not finite becomes zero, its residual infinite.
  // raised: what the values were before they were rounded, or null. Returns the samples that have changed.
  std::int64_t (*lower)(const Krylov<Scalar>&, Scalar* values, const Scalar* raised, int threads);
  // Measures `u`, of which `product` is the product, for the samples that have changed.
  void (*remeasure)(const Krylov<Scalar>&, const Scalar* u, const Scalar* product, int threads);
  // out = g times 2^-exponent; zero for a sample that was not asked for or whose g is not finite.
  void (*scale)(const Krylov<Scalar>&, Scalar* out, int threads);
  // Takes in u, found by another method than GMRES. product: A u, or null where its residual is told.
  void (*settle)(const Krylov<Scalar>&, const Scalar* u, const Scalar* product, const KrylovTold&, int threads);
};

template <class Scalar>
const KrylovPasses<Scalar>& krylov_passes();  // of the instruction set chosen

}  // namespace pydeqsolve
