// Chooses the CPU build of the step once, by what this processor can run.
#if defined(PYDEQSOLVE_X86)
#include <cpuid.h>
#endif

#include <initializer_list>

#include "judge.h"
#include "step.h"

namespace pydeqsolve {

#define PYDEQSOLVE_DECLARE(isa)                                                                                     \
  namespace isa {                                                                                                   \
  template <class Scalar>                                                                                           \
  void measure(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, double*, Norm, int);              \
  template <class Scalar>                                                                                           \
  void weights(const Rows&, const History<Scalar>&, Coupling, double, const std::uint8_t*, double*, std::int32_t*,  \
               int);                                                                                                \
  template <class Scalar>                                                                                           \
  void mix(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, double, const Scalar*, Scalar*, \
           int);                                                                                                    \
  template <class Scalar>                                                                                           \
  Counts step(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, const Judgement&, Record*,         \
              const Update&, std::uint8_t*, Scalar*, int);                                                          \
  }
PYDEQSOLVE_DECLARE(portable)
#if defined(PYDEQSOLVE_X86)
PYDEQSOLVE_DECLARE(avx2)
PYDEQSOLVE_DECLARE(avx512)
#endif

namespace {

enum class Isa { kPortable, kAvx2, kAvx512 };

#if defined(PYDEQSOLVE_X86)
// F16C, by a name that every compiler knows.
bool converts_half() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

Isa detect() {
#if defined(PYDEQSOLVE_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !converts_half()) return Isa::kPortable;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kPortable;
#endif
}

Isa chosen = detect();

}  // namespace

const char* cpu_isa() { return chosen == Isa::kAvx512 ? "avx512" : chosen == Isa::kAvx2 ? "avx2" : "portable"; }

// Takes a lower instruction set than the processor's, for tests; false when this build or processor lacks it.
bool choose_cpu_isa(const char* name) {
  const Isa best = detect();
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    const Isa before = chosen;
    chosen = isa;
    const char *a = cpu_isa(), *b = name;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b && static_cast<int>(isa) <= static_cast<int>(best)) return true;
    chosen = before;
  }
  return false;
}

#if defined(PYDEQSOLVE_X86)
#define PYDEQSOLVE_DISPATCH(call)                  \
  if (chosen == Isa::kAvx512) return avx512::call; \
  if (chosen == Isa::kAvx2) return avx2::call;     \
  return portable::call
#else
#define PYDEQSOLVE_DISPATCH(call) return portable::call
#endif

template <class Scalar>
void measure_cpu(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z, double* norms,
                 Norm norm, int threads) {
  PYDEQSOLVE_DISPATCH(measure(rows, history, f, z, norms, norm, threads));
}

template <class Scalar>
void weights_cpu(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                 const std::uint8_t* mode, double* gamma, std::int32_t* dropped, int threads) {
  PYDEQSOLVE_DISPATCH(weights(rows, history, coupling, ridge, mode, gamma, dropped, threads));
}

template <class Scalar>
void mix_cpu(const Rows& rows, const History<Scalar>& history, const double* gamma, const std::uint8_t* mode,
             double beta, const Scalar* z, Scalar* z_next, int threads) {
  PYDEQSOLVE_DISPATCH(mix(rows, history, gamma, mode, beta, z, z_next, threads));
}

template <class Scalar>
Counts step_cpu(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z,
                const Judgement& rule, Record* table, const Update& update, std::uint8_t* mode, Scalar* z_next,
                int threads) {
  PYDEQSOLVE_DISPATCH(step(rows, history, f, z, rule, table, update, mode, z_next, threads));
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                                \
  template void measure_cpu<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, double*, Norm, \
                                    int);                                                                             \
  template void weights_cpu<Scalar>(const Rows&, const History<Scalar>&, Coupling, double, const std::uint8_t*,       \
                                    double*, std::int32_t*, int);                                                     \
  template void mix_cpu<Scalar>(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, double,      \
                                const Scalar*, Scalar*, int);                                                         \
  template Counts step_cpu<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*,                 \
                                   const Judgement&, Record*, const Update&, std::uint8_t*, Scalar*, int);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)
PYDEQSOLVE_INSTANTIATE(BFloat16)
PYDEQSOLVE_INSTANTIATE(Half)

}  // namespace pydeqsolve
