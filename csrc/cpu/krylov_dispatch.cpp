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

int judge_krylov(KrylovSample& s, const KrylovJudgement& rule) { return status_of(s, rule); }

std::int64_t judge_krylov(std::int64_t B, KrylovSample* samples, const KrylovJudgement& rule, std::int64_t* status,
                          double* residual, std::int64_t* evaluations) {
  std::int64_t failed = 0;
  for (std::int64_t i = 0; i < B; ++i) {
    failed += tell_sample(samples[i], rule, i, status, residual, evaluations);
  }
  return failed;
}

}  // namespace pydeqsolve
