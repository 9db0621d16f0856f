// The adjoint's Krylov passes on a device: one struct for every call, addresses of what Python allocates there.
#pragma once
#include "krylov.h"

namespace pydeqsolve {

// What is constant in a solve, then what each pass reads and writes; KrylovPasses says what they do.
struct KrylovCall {
  std::int64_t B, N;
  std::int64_t most;  // vectors of a cycle, kMostVectors at most
  double eps;         // of Scalar
  const void* g;      // (B, N)
  KrylovSample* samples;
  void** vectors;        // (most + 1,) addresses of q_0 ...; each pass that makes a vector writes its own
  double** columns;      // (most,) likewise
  double* workspace;     // of krylov_workspace_doubles()
  std::int64_t* counts;  // (kKrylovCounts,)
  void* stream;
  std::int32_t is_double;  // Scalar is double, else float
  std::int32_t aligned;    // every vector of the cycle starts on 16 bytes

  std::int32_t k;               // append: vectors but one
  std::int32_t cautious;        // combine
  const std::uint8_t* mask;     // begin: (B,) or null
  const double *rtols, *atols;  // begin: (B,) or null
  double rtol, atol, rounding;  // begin: tolerances, unit of rounding of the products; judge: of the same
  const void* product;          // append, accept, remeasure: (B, N), as are all that follow
  const void* product2;
  const void *u1, *u2;            // accept, remeasure
  void* u;                        // accept, raise; combine: what is added to, or null
  void* next;                     // begin: q_0, append: q_{k+1}, combine: the next u, accept: q_0 of the next cycle
  double* column;                 // append: column k, (B, k + 4)
  void* values;                   // lower
  const void* raised;             // lower: or null
  std::int32_t adjoint, follows;  // judge
  std::int64_t* status;           // judge: (B,), as are all that follow
  double* residual;
  std::int64_t* evaluations;
};

// Its fields, in their order.
// clang-format off
#define PYDEQSOLVE_KRYLOV_CALL(X)                                                                                     \
  X(B) X(N) X(most) X(eps) X(g) X(samples) X(vectors) X(columns) X(workspace) X(counts) X(stream) X(is_double)        \
  X(aligned) X(k) X(cautious) X(mask) X(rtols) X(atols) X(rtol) X(atol) X(rounding) X(product) X(product2) X(u1)      \
  X(u2) X(u) X(next) X(column) X(values) X(raised) X(adjoint) X(follows) X(status) X(residual) X(evaluations)
// clang-format on

enum class KrylovPass : int { kBegin, kAppend, kCombine, kAccept, kRaise, kLower, kRemeasure, kJudge, kCount };
constexpr const char* kKrylovPasses[] = {"begin", "append",    "combine", "accept", "raise",
                                         "lower", "remeasure", "judge",   "count"};

// Samples by what is counted of them, in `counts`.
enum KrylovCount : int { kGoing, kActive, kUnsound, kChanged, kFailed, kKrylovCounts };

constexpr std::int64_t kMostVectors = 1024;  // their coordinates lie in a thread block's shared memory

// Null, or what a launch reported. Nothing is counted but by kCount.
const char* krylov_cuda(KrylovPass pass, const KrylovCall& call);
std::int64_t krylov_workspace_doubles(std::int64_t B, std::int64_t N, std::int64_t most);

}  // namespace pydeqsolve
