// Chooses the CPU build of the Krylov passes, and judges what they leave.
#include <cmath>

#include "krylov_sample.h"
#include "step.h"

namespace pydeqsolve {

#define PYDEQSOLVE_DECLARE(isa)                \
  namespace isa {                              \
  template <class Scalar>                      \
  const KrylovPasses<Scalar>& krylov_passes(); \
  }
PYDEQSOLVE_DECLARE(portable)
#if defined(PYDEQSOLVE_X86)
PYDEQSOLVE_DECLARE(avx2)
PYDEQSOLVE_DECLARE(avx512)
#endif

template <class Scalar>
const KrylovPasses<Scalar>& krylov_passes() {
#if defined(PYDEQSOLVE_X86)
  const char* const isa = cpu_isa();
  if (isa[0] == 'a') return isa[3] == '5' ? avx512::krylov_passes<Scalar>() : avx2::krylov_passes<Scalar>();
#endif
  return portable::krylov_passes<Scalar>();
}
template const KrylovPasses<float>& krylov_passes<float>();
template const KrylovPasses<double>& krylov_passes<double>();

namespace {

constexpr double kRounding = 2;  // units of rounding of u within which a residual is as small as it gets

// `AdjointSolve._judge` of pydeqsolve/derivative/adjoint.py.
int judged(KrylovSample& s, const KrylovJudgement& rule) {
  const double floor = rule.eps * s.length;
  int status = s.ended;
  s.best = s.best >= floor || s.best != s.best ? s.best : floor;
  double goal = s.goal;
  if (rule.follows) {  // no finer than rounding, but half of the digits are the least that deserve the name
    const double least = rule.eps * s.norm, allowed = kRounding * (floor > least ? floor : least);
    const double half = std::sqrt(rule.eps) * s.norm, most = allowed < half ? allowed : half;
    goal = goal > most ? goal : most;
  }
  const bool met = s.best <= goal;
  if (!met && (status == kConverged || (status == kMaxSteps && floor > goal))) status = kStalled;
  if (met) status = kConverged;
  return s.best < INFINITY && !s.lost ? status : kNonfinite;
}

}  // namespace

int judge_krylov(KrylovSample& s, const KrylovJudgement& rule) {
  return rule.adjoint ? judged(s, rule) : s.lost ? kNonfinite : outcome_of(s);
}

std::int64_t judge_krylov(std::int64_t B, KrylovSample* samples, const KrylovJudgement& rule, std::int64_t* status,
                          double* residual, std::int64_t* evaluations) {
  std::int64_t failed = 0;
  for (std::int64_t i = 0; i < B; ++i) {
    KrylovSample& s = samples[i];
    const int found = judge_krylov(s, rule);
    failed += found != kConverged && !s.out;
    status[i] = s.out ? kNonfinite : found;
    residual[i] = s.lost || !(s.best < INFINITY) ? INFINITY : s.best / s.norm;
    evaluations[i] = s.evaluations;
  }
  return failed;
}

}  // namespace pydeqsolve
