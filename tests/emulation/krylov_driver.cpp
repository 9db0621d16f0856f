// Solves adjoint systems by the emulated CUDA passes and by the CPU's, for the sanitizers: they cannot be loaded into a
// Python that was built without them. Every array has exactly the size the passes may touch.
// Usage: krylov_driver [schedule]; exits with 1 when results differ.
#include <memory>

#include "cuda_emu.h"
// After the emulator, which stands in for the language.
#include "cuda/krylov_cuda.cu"

EMULATION_DEFINE_SWITCH

using namespace pydeqsolve;

namespace {

struct Case {
  std::int64_t B, N;
  int most;
  bool misaligned;  // by one element: the path without 16-byte loads
  bool bad;         // the first sample has products that are not finite
};
// A warp owns up to 1024 entries, a thread block up to 4096 and chunks of that; dots come eight at a time.
const Case kCases[] = {{3, 40, 12, false, false}, {9, 41, 10, true, true},     {2, 1030, 11, false, false},
                       {2, 4099, 9, true, true},  {2, 4104, 10, false, false}, {300, 5, 5, false, true}};

std::uint64_t state = 1;
double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) / static_cast<double>(1ull << 52) - 1;
}

int failures = 0;
void expect(bool holds, const char* what, const Case& c) {
  if (holds) return;
  std::fprintf(stderr, "%s: B %ld N %ld most %d\n", what, static_cast<long>(c.B), static_cast<long>(c.N), c.most);
  ++failures;
}

// Memory of one size, off 16 bytes by one element or not.
template <class T>
struct Array {
  std::vector<T> memory;
  bool shifted;
  explicit Array(std::int64_t size, bool misaligned = false)
      : memory(static_cast<std::size_t>(size) + misaligned, T(NAN)), shifted(misaligned) {}
  T* data() { return memory.data() + shifted; }
};

template <class Scalar>
struct Problem {
  const Case& c;
  std::vector<Scalar> rate;
  Array<Scalar> g;
  explicit Problem(const Case& c) : c(c), g(c.B * c.N, c.misaligned) {
    for (std::int64_t e = 0; e < c.B * c.N; ++e) {
      rate.push_back(static_cast<Scalar>(c.bad && e < c.N ? 1e30 : 0.9 * uniform()));
      g.data()[e] = static_cast<Scalar>(uniform());
    }
  }
  void apply(const Scalar* u, Scalar* out) const {
    for (std::int64_t e = 0; e < c.B * c.N; ++e) out[e] = rate[static_cast<std::size_t>(e)] * u[e];
  }
};

// The u of one cycle and, told of it, status and residual.
template <class Scalar>
struct Found {
  std::vector<Scalar> u;
  std::vector<std::int64_t> status, evaluations;
  std::vector<double> residual;
  explicit Found(const Case& c)
      : u(static_cast<std::size_t>(c.B * c.N)),
        status(static_cast<std::size_t>(c.B)),
        evaluations(status.size()),
        residual(status.size()) {}
};
constexpr double kTolerance = 1e-4;

template <class Scalar>
std::vector<std::unique_ptr<Array<Scalar>>> vectors_of(const Case& c) {
  std::vector<std::unique_ptr<Array<Scalar>>> vectors;
  for (int j = 0; j <= c.most; ++j) vectors.emplace_back(new Array<Scalar>(c.B * c.N, c.misaligned));
  return vectors;
}

template <class Scalar>
Found<Scalar> on_cuda(Problem<Scalar>& problem, double eps) {
  const Case& c = problem.c;
  Found<Scalar> found(c);
  auto vectors = vectors_of<Scalar>(c);
  Array<Scalar> product(c.B * c.N, c.misaligned), u(c.B * c.N, c.misaligned);
  Array<Scalar> cautious(c.B * c.N, c.misaligned), product2(c.B * c.N, c.misaligned);
  std::vector<KrylovSample> samples(static_cast<std::size_t>(c.B));
  std::vector<void*> places(static_cast<std::size_t>(c.most) + 1);
  std::vector<double*> columns(static_cast<std::size_t>(c.most));
  std::vector<std::vector<double>> column;
  for (int j = 0; j < c.most; ++j) column.emplace_back(static_cast<std::size_t>(c.B * (j + 4)), NAN);
  std::vector<double> workspace(static_cast<std::size_t>(krylov_workspace_doubles(c.B, c.N, c.most)), NAN);
  std::vector<std::int64_t> counts(kKrylovCounts);
  KrylovCall call{};
  call.B = c.B, call.N = c.N, call.most = c.most, call.eps = eps, call.g = problem.g.data();
  call.samples = samples.data(), call.vectors = places.data(), call.columns = columns.data();
  call.workspace = workspace.data(), call.counts = counts.data();
  call.is_double = sizeof(Scalar) == 8, call.aligned = !c.misaligned;
  call.rtol = kTolerance;
  const auto run = [&](KrylovPass pass) {
    const char* const error = krylov_cuda(pass, call);
    expect(!error, error ? error : "", c);
  };
  call.next = vectors[0]->data();
  run(KrylovPass::kBegin);
  call.product = product.data();
  for (call.k = 0; call.k < c.most; ++call.k) {
    problem.apply(vectors[static_cast<std::size_t>(call.k)]->data(), product.data());
    call.next = vectors[static_cast<std::size_t>(call.k) + 1]->data();
    call.column = column[static_cast<std::size_t>(call.k)].data();
    run(KrylovPass::kAppend);
    run(KrylovPass::kCount);
  }
  call.u = nullptr, call.next = u.data();
  run(KrylovPass::kCombine);
  call.cautious = 1, call.next = cautious.data();
  run(KrylovPass::kCombine);
  problem.apply(u.data(), product.data());
  problem.apply(cautious.data(), product2.data());
  call.u1 = u.data(), call.u2 = cautious.data(), call.product2 = product2.data();
  call.u = u.data(), call.next = vectors[0]->data();
  run(KrylovPass::kAccept);
  run(KrylovPass::kRaise);
  call.values = cautious.data(), call.raised = u.data();
  std::copy(u.data(), u.data() + c.B * c.N, cautious.data());
  run(KrylovPass::kLower);
  problem.apply(cautious.data(), product.data());
  call.u1 = cautious.data();
  run(KrylovPass::kRemeasure);
  call.status = found.status.data(), call.residual = found.residual.data();
  call.evaluations = found.evaluations.data();
  run(KrylovPass::kJudge);
  run(KrylovPass::kCount);
  std::copy(u.data(), u.data() + c.B * c.N, found.u.begin());
  return found;
}

template <class Scalar>
Found<Scalar> on_cpu(Problem<Scalar>& problem, double eps) {
  const Case& c = problem.c;
  Found<Scalar> found(c);
  auto vectors = vectors_of<Scalar>(c);
  std::vector<Scalar*> places;
  for (const auto& vector : vectors) places.push_back(vector->data());
  Array<Scalar> product(c.B * c.N), cautious(c.B * c.N), product2(c.B * c.N);
  std::vector<KrylovSample> samples(static_cast<std::size_t>(c.B));
  std::vector<std::vector<double>> column;
  std::vector<double*> columns;
  for (int j = 0; j < c.most; ++j) column.emplace_back(static_cast<std::size_t>(c.B * (j + 4)), NAN);
  for (auto& each : column) columns.push_back(each.data());
  const Krylov<Scalar> solve{c.B, c.N, eps, problem.g.data(), samples.data(), places.data(), columns.data()};
  const KrylovPasses<Scalar>& passes = krylov_passes<Scalar>();
  passes.begin(solve, nullptr, {kTolerance, 0, nullptr, nullptr, 0}, places[0], 1);
  for (int k = 0; k < c.most; ++k) {
    problem.apply(places[static_cast<std::size_t>(k)], product.data());
    passes.append(solve, k, product.data(), places[static_cast<std::size_t>(k) + 1], 1);
  }
  Scalar* const u = found.u.data();
  passes.combine(solve, false, nullptr, u, 1);
  passes.combine(solve, true, nullptr, cautious.data(), 1);
  problem.apply(u, product.data());
  problem.apply(cautious.data(), product2.data());
  passes.accept(solve, u, product.data(), cautious.data(), product2.data(), u, places[0], 1);
  passes.raise(solve, u, 1);
  std::copy(u, u + c.B * c.N, cautious.data());
  passes.lower(solve, cautious.data(), u, 1);
  problem.apply(cautious.data(), product.data());
  passes.remeasure(solve, cautious.data(), product.data(), 1);
  judge_krylov(c.B, samples.data(), {false, false, 0}, found.status.data(), found.residual.data(),
               found.evaluations.data());
  return found;
}

template <class Scalar>
void compare(const Case& c, double eps) {
  Problem<Scalar> problem(c);
  const Found<Scalar> found = on_cuda(problem, eps), known = on_cpu(problem, eps);
  bool close = true;
  for (std::size_t e = 0; e < found.u.size(); ++e) {
    const double x = found.u[e], y = known.u[e];
    close = close && std::abs(x - y) <= 1e3 * eps * (1 + std::abs(y));
  }
  expect(close, "u", c);
  expect(found.status == known.status, "status", c);
  expect(found.evaluations == known.evaluations, "evaluations", c);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) emulation::schedule = std::atoi(argv[1]);
  for (const Case& c : kCases) {
    compare<float>(c, 0x1p-23);
    if (c.N < 1000) compare<double>(c, 0x1p-52);
  }
  std::printf("%ld launches, %d failures\n", static_cast<long>(emulation::launches), failures);
  return failures != 0;
}
