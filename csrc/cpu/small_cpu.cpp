// Adjoint systems of a few unknowns on the CPU; an iteration's work is a few operations, so there is one build.
#include "small.h"

#include <cmath>

#include "cpu/parallel.h"
#include "krylov_sample.h"

namespace pydeqsolve {
namespace {

template <class Scalar>
struct System {
  KrylovSample sample;
  double g[kMostUnknowns];  // scaled
};

template <class Scalar>
System<Scalar> system_at(const Small<Scalar>& c, std::int64_t i) {
  System<Scalar> system{};
  const bool out = c.mask && !c.mask[i];
  double most = 0, squares = 0;
  bool lost = false;
  for (int e = 0; e < c.N && !out; ++e) {
    const double x = std::fabs(static_cast<double>(c.g[i * c.N + e]));
    lost = lost || !(x < INFINITY);
    most = x > most ? x : most;
  }
  const Power down(lost ? 0 : -exponent_of(most));
  for (int e = 0; e < c.N && !out && !lost; ++e) {
    system.g[e] = static_cast<Scalar>(down(static_cast<double>(c.g[i * c.N + e])));
    squares += system.g[e] * system.g[e];
  }
  system.sample = system_of(out, most, lost, squares, c.asked, i);
  return system;
}

template <class Scalar, class Body>
void each(const Small<Scalar>& c, const Body& body) {
  const std::int64_t bytes = 64 * c.B * c.N;
  parallel_for(c.B, bytes, c.threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i);
  });
}

// x of M x = r, by elimination with row pivots; not finite where a pivot is zero.
void eliminate(int N, double (*M)[kMostUnknowns], double* x) {
  for (int k = 0; k < N; ++k) {
    int pivot = k;
    for (int i = k + 1; i < N; ++i) pivot = std::fabs(M[i][k]) > std::fabs(M[pivot][k]) ? i : pivot;
    for (int j = k; j < N && pivot != k; ++j) {
      const double kept = M[k][j];
      M[k][j] = M[pivot][j], M[pivot][j] = kept;
    }
    const double kept = x[k];
    x[k] = x[pivot], x[pivot] = kept;
    for (int i = k + 1; i < N; ++i) {
      const double factor = M[i][k] / M[k][k];
      for (int j = k + 1; j < N; ++j) M[i][j] -= factor * M[k][j];
      x[i] -= factor * x[k];
    }
  }
  for (int k = N - 1; k >= 0; --k) {
    for (int j = k + 1; j < N; ++j) x[k] -= M[k][j] * x[j];
    x[k] /= M[k][k];
  }
}

double length_of(int N, const double* x) {
  double squares = 0;
  for (int e = 0; e < N; ++e) squares += x[e] * x[e];
  return std::sqrt(squares);
}

// Takes in the residual of a sample's u.
template <class Scalar>
void measure(const Small<Scalar>& c, std::int64_t i, const Scalar* u, const Scalar* product, System<Scalar>& system) {
  double squares = 0, length = 0;
  for (int e = 0; e < c.N; ++e) {
    const double x = u[i * c.N + e], r = system.g[e] + product[i * c.N + e] - x;
    squares += r * r, length += x * x;
  }
  system.sample.best = blurred(squares, length, c.eps);
  system.sample.length = std::sqrt(length);
}

}  // namespace

template <class Scalar>
std::int64_t small_active(const Small<Scalar>& c) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < c.B; ++i) count += system_at(c, i).sample.active;
  return count;
}

template <class Scalar>
void small_column(const Small<Scalar>& c, int j, const Scalar* product, Scalar* matrix) {
  each(c, [&](std::int64_t i) {
    for (int e = 0; e < c.N; ++e) matrix[(i * c.N + e) * c.N + j] = Scalar(e == j) - product[i * c.N + e];
  });
}

template <class Scalar>
void small_solve(const Small<Scalar>& c, const Scalar* matrix, Scalar* u, bool* unmet) {
  each(c, [&](std::int64_t i) {
    const System<Scalar> system = system_at(c, i);
    double M[kMostUnknowns][kMostUnknowns] = {}, x[kMostUnknowns] = {};
    unmet[i] = false;
    if (system.sample.active) {
      for (int e = 0; e < c.N; ++e) {
        x[e] = system.g[e];
        for (int j = 0; j < c.N; ++j) M[e][j] = matrix[(i * c.N + e) * c.N + j];
      }
      eliminate(c.N, M, x);
      // A direction that I - A nearly loses, or a matrix that is not finite.
      unmet[i] = !(length_of(c.N, x) <= length_of(c.N, system.g) / std::sqrt(c.eps));
    }
    for (int e = 0; e < c.N; ++e) u[i * c.N + e] = unmet[i] ? Scalar{0} : static_cast<Scalar>(x[e]);
  });
}

template <class Scalar>
std::int64_t small_measure(const Small<Scalar>& c, const Scalar* u, const Scalar* product, bool* unmet) {
  each(c, [&](std::int64_t i) {
    System<Scalar> system = system_at(c, i);
    if (!system.sample.active || unmet[i]) return;
    measure(c, i, u, product, system);
    const Power up(system.sample.exponent), down(-system.sample.exponent);
    bool exact = true;
    for (int e = 0; e < c.N; ++e) {
      const Scalar x = u[i * c.N + e], raised = static_cast<Scalar>(up(x));
      exact = exact && static_cast<Scalar>(down(raised)) == x;
    }
    unmet[i] = !exact || !(system.sample.best <= system.sample.pursued);
  });
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < c.B; ++i) count += unmet[i];
  return count;
}

template <class Scalar>
std::int64_t small_judge(const Small<Scalar>& c, const Scalar* u, const Scalar* product, const bool* unmet,
                         const KrylovJudgement& rule, int evaluations, std::int64_t* status, double* residual,
                         std::int64_t* counts) {
  std::int64_t failed = 0;
  for (std::int64_t i = 0; i < c.B; ++i) {
    if (unmet[i]) continue;
    System<Scalar> system = system_at(c, i);
    KrylovSample& s = system.sample;
    if (s.active) measure(c, i, u, product, system);
    s.ended = kConverged;
    const int found = judge_krylov(s, rule);
    failed += found != kConverged && !s.out;
    status[i] = s.out ? kNonfinite : found;
    residual[i] = s.lost || !(s.best < INFINITY) ? INFINITY : s.best / s.norm;
    counts[i] = s.active ? evaluations : 0;
  }
  return failed;
}

template <class Scalar>
void small_raise(const Small<Scalar>& c, Scalar* u) {
  each(c, [&](std::int64_t i) {
    const KrylovSample s = system_at(c, i).sample;
    const Power up(s.exponent);
    for (int e = 0; e < c.N; ++e) {
      u[i * c.N + e] = s.lost ? static_cast<Scalar>(NAN) : static_cast<Scalar>(up(u[i * c.N + e]));
    }
  });
}

template <class Scalar>
void small_lower(const Small<Scalar>& c, Scalar* values, bool* unmet) {
  each(c, [&](std::int64_t i) {
    const KrylovSample s = system_at(c, i).sample;
    const Power down(-s.exponent);
    bool finite = true;
    for (int e = 0; e < c.N; ++e) finite = finite && std::fabs(static_cast<double>(values[i * c.N + e])) < INFINITY;
    unmet[i] = unmet[i] || (!finite && !s.lost);
    for (int e = 0; e < c.N; ++e) {
      values[i * c.N + e] = finite ? static_cast<Scalar>(down(values[i * c.N + e])) : Scalar{0};
    }
  });
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                           \
  template std::int64_t small_active<Scalar>(const Small<Scalar>&);                                              \
  template void small_column<Scalar>(const Small<Scalar>&, int, const Scalar*, Scalar*);                         \
  template void small_solve<Scalar>(const Small<Scalar>&, const Scalar*, Scalar*, bool*);                        \
  template std::int64_t small_measure<Scalar>(const Small<Scalar>&, const Scalar*, const Scalar*, bool*);        \
  template std::int64_t small_judge<Scalar>(const Small<Scalar>&, const Scalar*, const Scalar*, const bool*,     \
                                            const KrylovJudgement&, int, std::int64_t*, double*, std::int64_t*); \
  template void small_raise<Scalar>(const Small<Scalar>&, Scalar*);                                              \
  template void small_lower<Scalar>(const Small<Scalar>&, Scalar*, bool*);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)

}  // namespace pydeqsolve
