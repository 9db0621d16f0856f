// Chooses the CPU build of the step once, by what this processor can run.
#if defined(PYDEQSOLVE_X86)
#include <cpuid.h>
#endif

#include <initializer_list>

#include "step.h"

namespace pydeqsolve {

namespace portable {
extern const Passes passes;
}
#if defined(PYDEQSOLVE_X86)
namespace avx2 {
extern const Passes passes;
}
namespace avx512 {
extern const Passes passes;
}
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

const Passes& cpu_passes() {
#if defined(PYDEQSOLVE_X86)
  if (chosen == Isa::kAvx512) return avx512::passes;
  if (chosen == Isa::kAvx2) return avx2::passes;
#endif
  return portable::passes;
}

}  // namespace pydeqsolve
