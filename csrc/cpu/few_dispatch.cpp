// Chooses the CPU build of the step of a few unknowns.
#include "few.h"

namespace pydeqsolve {

#define PYDEQSOLVE_DECLARE(isa) \
  namespace isa {               \
  extern const FewPass few;     \
  }
PYDEQSOLVE_DECLARE(portable)
#if defined(PYDEQSOLVE_X86)
PYDEQSOLVE_DECLARE(avx2)
PYDEQSOLVE_DECLARE(avx512)
#endif

FewPass few_pass() {
#if defined(PYDEQSOLVE_X86)
  const char* const isa = cpu_isa();
  if (isa[0] == 'a') return isa[3] == '5' ? avx512::few : avx2::few;
#endif
  return portable::few;
}

}  // namespace pydeqsolve
