// Runs the emulated CUDA step beside the CPU step over shapes that reach every path, for the sanitizers: they cannot be
// loaded into a Python that was built without them. Every array has exactly the size the step may touch.
// Usage: driver [schedule]; exits with 1 when results differ.
#include "cuda_emu.h"
// After the emulator, which stands in for the language.
#include "cuda/step_cuda.cu"

EMULATION_DEFINE_SWITCH

using namespace pydeqsolve;

namespace {

struct Case {
  std::int64_t B, T, D;
  int memory;
  Kind kind;
  Coupling coupling;
  Norm norm;
  double beta;
  bool misaligned;  // by one element: the path without 16-byte loads
};

// A warp owns a block up to 1024 features, a thread block a chunk of 4096 beyond; memory 4, 8 and 16 are the sizes of
// the groups of ages; small systems are solved in the mix kernel up to memory 8 or 16; sums over time take 32 segments.
const Case kCases[] = {
    {3, 1, 40, 3, Kind::kAndersonII, Coupling::kJoint, Norm::kRms, 1, false},
    {9, 1, 41, 5, Kind::kAndersonII, Coupling::kIndependent, Norm::kMax, 0.8, false},
    {2, 1, 96, 5, Kind::kAndersonII, Coupling::kJoint, Norm::kMax, 1, true},
    {2, 3, 64, 4, Kind::kAndersonI, Coupling::kIndependent, Norm::kRms, 0.5, false},
    {2, 35, 24, 3, Kind::kAndersonII, Coupling::kCausal, Norm::kRms, 1, false},
    {2, 4, 30, 9, Kind::kBroydenGood, Coupling::kCausal, Norm::kMax, 1, false},
    {2, 3, 60, 6, Kind::kBroydenBad, Coupling::kJoint, Norm::kRms, 1, true},
    {2, 1, 2048, 10, Kind::kBroydenGood, Coupling::kJoint, Norm::kRms, 1, false},
    {2, 1, 1030, 12, Kind::kAndersonII, Coupling::kJoint, Norm::kMax, 0.7, true},
    {1, 2, 4104, 5, Kind::kAndersonII, Coupling::kIndependent, Norm::kMax, 1, false},
    {2, 1, 4099, 3, Kind::kAndersonI, Coupling::kJoint, Norm::kRms, 1, false},
    {1, 1, 150, 20, Kind::kAndersonII, Coupling::kJoint, Norm::kRms, 1, false},
};

std::uint64_t state = 1;
double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) / static_cast<double>(1ull << 52) - 1;
}

template <class T>
double number(T x) {
  return static_cast<double>(x);
}
double number(BFloat16 x) { return static_cast<float>(x); }
double number(Half x) { return static_cast<float>(x); }

template <class T>
struct Array {
  std::vector<T> memory;
  bool shifted;
  explicit Array(std::int64_t size, bool misaligned = false, T value = T(0))
      : memory(static_cast<std::size_t>(size) + misaligned, value), shifted(misaligned) {}
  T* data() { return memory.data() + shifted; }
  void fill() {
    for (T& x : memory) x = static_cast<T>(static_cast<Wide<T>>(uniform()));
  }
};

template <class Scalar>
struct Store {
  Array<Scalar> R, F;
  Array<double> gram, steps_gram, rhs, squares;
  Array<std::int32_t> count;
  Store(const Case& c, std::int64_t M)
      : R(c.B * M * c.T * c.D, c.misaligned),
        F(c.B * M * c.T * c.D, c.misaligned),
        gram(c.B * c.T * M * M),
        steps_gram(c.kind == Kind::kBroydenGood ? c.B * c.T * M * M : 0),
        rhs(c.B * c.T * M),
        squares(c.B * c.T * 2),
        count(c.B * c.T) {}
  Ring ring(const Case& c, int head, double eps) {
    const std::int64_t row = c.T * c.D, M = c.memory + 1;
    const bool by_slots = c.memory % 2 == 1;
    Ring ring{};
    ring.storage = kStorage<Scalar>, ring.slots = c.memory + 1, ring.head = head;
    ring.kind = c.kind, ring.coupling = c.coupling, ring.ridge = 1e-3, ring.damping = c.beta, ring.eps = eps;
    ring.samples = c.B, ring.blocks = c.T, ring.features = c.D;
    ring.sample_stride = by_slots ? row : M * row, ring.slot_stride = by_slots ? c.B * row : row;
    ring.R = R.data(), ring.F = F.data(), ring.gram = gram.data();
    ring.steps_gram = c.kind == Kind::kBroydenGood ? steps_gram.data() : nullptr;
    ring.rhs = rhs.data(), ring.squares = squares.data(), ring.count = count.data();
    return ring;
  }
};

int failures = 0;

template <class T>
void expect_equal(const char* what, const Case& c, const Array<T>& a, const Array<T>& b, double tolerance) {
  for (std::size_t i = 0; i < a.memory.size(); ++i) {
    const double x = number(a.memory[i]), y = number(b.memory[i]);
    if (std::abs(x - y) <= tolerance * (1 + std::abs(x))) continue;
    std::fprintf(stderr, "%s: %g, on the CPU %g, at %zu; B %ld T %ld D %ld memory %d kind %d coupling %d\n", what, x, y,
                 i, static_cast<long>(c.B), static_cast<long>(c.T), static_cast<long>(c.D), c.memory,
                 static_cast<int>(c.kind), static_cast<int>(c.coupling));
    ++failures;
    return;
  }
}

void expect_launched(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "launch: %s\n", error);
  ++failures;
}

// Scalar, with the unit of its rounding.
template <class Scalar>
void run(const Case& c, double unit) {
  const int M = c.memory + 1;
  const std::int64_t blocks = c.B * c.T, size = blocks * c.D;
  const bool narrow = sizeof(Scalar) == 2;  // the CPU adds up products of such rows in float
  Store<Scalar> cuda(c, M), cpu(c, M);
  Array<std::int64_t> index(c.B);
  for (std::int64_t i = 0; i < c.B; ++i) index.data()[i] = c.B - 1 - i;
  for (int step = 0; step < M + 2; ++step) {
    Array<Scalar> f(size, c.misaligned), z(size, c.misaligned), next(size, c.misaligned), next_cpu = next;
    Array<double> norms(2 * blocks), norms_cpu = norms, gamma(blocks * M), gamma_cpu = gamma;
    Array<std::int32_t> dropped(blocks), dropped_cpu = dropped;
    Array<std::uint8_t> wanted(blocks, false, 1), mode(blocks, false, kMix);
    f.fill();
    z.fill();
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (uniform() > 0.8) wanted.data()[b] = 0, mode.data()[b] = kKeep;
      if (wanted.data()[b] && uniform() > 0.7) mode.data()[b] = step % 2 ? kAccept : step > 1 ? kPlain : kReject;
    }
    Call on_cuda{}, on_cpu{};
    on_cuda.ring = cuda.ring(c, step % M, unit), on_cpu.ring = cpu.ring(c, step % M, unit);
    Array<double> workspace(workspace_doubles(on_cuda.ring, c.B), false, NAN);
    on_cuda.workspace = workspace.data(), on_cpu.threads = 1;
    on_cuda.norms = norms.data(), on_cpu.norms = norms_cpu.data();
    on_cuda.gamma = gamma.data(), on_cpu.gamma = gamma_cpu.data();
    on_cuda.dropped = dropped.data(), on_cpu.dropped = dropped_cpu.data();
    on_cuda.z_next = next.data(), on_cpu.z_next = next_cpu.data();
    for (Call* call : {&on_cuda, &on_cpu}) {
      call->rule.norm = c.norm, call->n = c.B, call->rows = step % 2 ? index.data() : nullptr;
      call->wanted = wanted.data(), call->f = f.data(), call->z = z.data(), call->mode = mode.data();
    }
    expect_launched(cuda_passes().measure(on_cuda));
    cpu_passes().measure(on_cpu);
    expect_equal("norms", c, norms, norms_cpu, 1e-12);
    expect_equal("R", c, cuda.R, cpu.R, 0);
    expect_equal("F", c, cuda.F, cpu.F, 0);
    expect_equal("squares", c, cuda.squares, cpu.squares, 1e-12);
    expect_equal("gram", c, cuda.gram, cpu.gram, narrow ? 1e-5 : 1e-12 * static_cast<double>(c.D));
    expect_launched(cuda_passes().advance(on_cuda));
    cpu_passes().weights(on_cpu);
    cpu_passes().mix(on_cpu);
    expect_equal("gamma", c, gamma, gamma_cpu, narrow ? 1e-3 : 1e-8);
    expect_equal("dropped", c, dropped, dropped_cpu, 0);
    expect_equal("count", c, cuda.count, cpu.count, 0);
    expect_equal("z", c, next, next_cpu, 100 * unit);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) emulation::schedule = std::atoi(argv[1]);
  int turn = 0;
  for (const Case& c : kCases) {
    run<float>(c, 1.2e-7);
    if (c.D < 1000) run<double>(c, 2.3e-16);
    if (++turn % 2) {
      run<BFloat16>(c, 7.8e-3);
    } else {
      run<Half>(c, 9.8e-4);
    }
  }
  std::printf("%ld launches, %d failures\n", static_cast<long>(emulation::launches), failures);
  return failures != 0;
}
