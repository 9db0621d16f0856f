// Random steps of the CPU kernels over sizes, alignments, memories, masks and values of every class, for the
// sanitizers. Every array has exactly the size the step may touch. A whole step must equal its passes bit for bit.
// Usage: step_fuzz cases [seed]; exits with 1 at the first difference. Compiled for one instruction set at a time.
// The checksum it prints is that of every value computed; builds of one lane width, without contraction of a product
// and a sum to one operation, agree in it whatever the processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cpu/dispatch.cpp"
#include "cpu/step_cpu.cpp"

using namespace pydeqsolve;

namespace {

// Looking for races takes threads, not entries: the build for it has PYDEQSOLVE_BYTES_PER_THREAD=64.
#if defined(__SANITIZE_THREAD__)
constexpr int kMostSamples = 6, kMostFeatures = 20, kLongRows = 200;  // one in so many
#else
constexpr int kMostSamples = 20, kMostFeatures = 70, kLongRows = 50;
#endif

std::uint64_t state = 1;
std::uint64_t bits() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
int below(int n) { return static_cast<int>((bits() >> 20) % static_cast<std::uint64_t>(n)); }
bool chance(int percent) { return below(100) < percent; }

// Ordinary most of the time; else zero, huge, subnormal, infinite or NaN.
template <class Scalar>
Scalar value(int odd_percent) {
  using Number = Wide<Scalar>;
  using Limits = std::numeric_limits<Number>;
  if (!chance(odd_percent)) {
    return static_cast<Scalar>(static_cast<Number>(static_cast<std::int64_t>(bits())) / Number(1ull << 62));
  }
  const Number odd[] = {0,
                        65504,  // the largest of 16 bits
                        -65504,
                        Number(3e-8),
                        Limits::max(),
                        -Limits::max(),
                        Limits::denorm_min(),
                        Limits::infinity(),
                        -Limits::infinity(),
                        Limits::quiet_NaN()};
  return static_cast<Scalar>(odd[below(10)]);
}

template <class Scalar>
struct Side {  // one of two equal histories
  std::vector<Scalar> R, F, out;
  std::vector<double> gram, steps_gram, rhs, squares;
  std::vector<std::int32_t> count;
  std::vector<Sample> table;
  std::vector<std::uint8_t> mode;
};

// The same bits, or both NaN.
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = static_cast<double>(Wide<T>(a[i])), y = static_cast<double>(Wide<T>(b[i]));
    if (!(x == y || (x != x && y != y))) return false;
  }
  return true;
}

std::uint64_t checksum = 0xcbf29ce484222325ull;
template <class T>
void add_to_checksum(const std::vector<T>& values) {
  for (const T& value : values) {
    double x = static_cast<double>(Wide<T>(value));
    if (x != x) x = std::numeric_limits<double>::quiet_NaN();  // processors differ in which NaN they make
    std::uint64_t word;
    std::memcpy(&word, &x, sizeof word);
    checksum = (checksum ^ word) * 0x100000001b3ull;
  }
}

template <class Scalar>
bool run(std::uint64_t seed) {
  state = seed * 0x9e3779b97f4a7c15ull + 1;
  for (int i = 0; i < 4; ++i) bits();
  const std::int64_t B = 1 + below(kMostSamples), T = 1 + below(4),
                     sizes[] = {1 + below(kMostFeatures), 1 + below(600), 16384 + below(40)};
  const int size = below(kLongRows), M = 1 + below(chance(10) ? kMaxSlots : 12), shift = below(3);
  const std::int64_t D = sizes[size == 0 ? 2 : size < 10 ? 1 : 0], history = B * M * T * D + shift;
  const Kind kind = static_cast<Kind>(below(4));
  const Norm norm = below(2) ? Norm::kMax : Norm::kRms;
  const Coupling coupling = static_cast<Coupling>(below(3));
  const double ridge = chance(50) ? 0 : 1e-6, damping = chance(50) ? 1.0 : 0.7;
  const Rule rule{chance(50) ? 2.0 : 0, 1e-7, double(T * D), norm};
  const int odd = chance(50) ? 0 : 3;
  const bool by_slots = chance(50);
  Side<Scalar> sides[2];
  for (Side<Scalar>& s : sides) {
    s.R.assign(history,
               Scalar(std::numeric_limits<Wide<Scalar>>::quiet_NaN()));  // what was never written must never be read
    s.F = s.R;
    s.gram.assign(B * T * M * M, 0);
    if (kind == Kind::kBroydenGood) s.steps_gram = s.gram;
    s.rhs.assign(B * T * M, 0);
    s.squares.assign(B * T * 2, 0);
    s.count.assign(B * T, 0);
    s.table.assign(B, Sample{});
    for (Sample& r : s.table) r.best = r.previous = r.residual = INFINITY, r.status = kRunning, r.rtol = 1e-4;
  }
  std::vector<std::int64_t> index(B);
  for (std::int64_t i = 0; i < B; ++i) index[i] = B - 1 - i;
  for (int step = 0; step < 4 + below(M); ++step) {
    std::vector<Scalar> f(B * T * D), z(B * T * D);
    for (std::int64_t i = 0; i < B * T * D; ++i) f[i] = value<Scalar>(odd), z[i] = value<Scalar>(odd);
    std::vector<std::uint8_t> wanted(B * T, 1);
    for (std::int64_t i = 0; i < B; ++i) {
      if (chance(10)) std::memset(wanted.data() + i * T, 0, T);
    }
    const bool mapped = chance(50);
    for (int k = 0; k < 2; ++k) {
      Side<Scalar>& s = sides[k];
      s.out.assign(B * T * D, Scalar(0.0f));
      s.mode.assign(B * T, 0);
      Call call{};
      Ring& ring = call.ring;
      ring.storage = kStorage<Scalar>, ring.slots = M, ring.head = step % M, ring.kind = kind, ring.coupling = coupling;
      ring.ridge = ridge, ring.damping = damping, ring.eps = 1e-7;
      ring.samples = B, ring.blocks = T, ring.features = D;
      ring.sample_stride = by_slots ? T * D : M * T * D, ring.slot_stride = by_slots ? B * T * D : T * D;
      ring.R = s.R.data() + shift, ring.F = s.F.data() + shift, ring.gram = s.gram.data();
      ring.steps_gram = kind == Kind::kBroydenGood ? s.steps_gram.data() : nullptr;
      ring.rhs = s.rhs.data(), ring.squares = s.squares.data(), ring.count = s.count.data();
      call.rule = rule, call.n = B, call.rows = mapped ? index.data() : nullptr, call.wanted = wanted.data();
      call.f = f.data(), call.z = z.data(), call.z_next = s.out.data();
      call.table = s.table.data(), call.mode = s.mode.data(), call.threads = 1 + below(3);
      if (k == 0) {
        cpu_passes().step(call);
        continue;
      }
      std::vector<double> norms(2 * B * T), gamma(B * T * M);
      std::vector<std::int32_t> dropped(B * T);
      call.norms = norms.data(), call.gamma = gamma.data(), call.dropped = dropped.data();
      cpu_passes().measure(call);
      judge_samples(B, T, norms.data(), nullptr, s.table.data(), rule, s.mode.data());
      cpu_passes().weights(call);
      cpu_passes().mix(call);
    }
    if (!same(sides[0].mode, sides[1].mode) || !same(sides[0].count, sides[1].count) ||
        !same(sides[0].gram, sides[1].gram))
      return false;
    for (std::int64_t i = 0; i < B * T; ++i) {
      if (sides[0].mode[i] == kMix && !wanted[i]) return true;  // a map's business: nothing is said of such blocks
    }
    if (!same(sides[0].out, sides[1].out)) return false;
    add_to_checksum(sides[0].out);
    add_to_checksum(sides[0].gram);
    add_to_checksum(sides[0].mode);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const long cases = argc > 1 ? std::atol(argv[1]) : 1000, first = argc > 2 ? std::atol(argv[2]) : 1;
  for (long i = first; i < first + cases; ++i) {
    const bool good = i % 4 == 0   ? run<double>(i)
                      : i % 4 == 1 ? run<float>(i)
                      : i % 4 == 2 ? run<BFloat16>(i)
                                   : run<Half>(i);
    if (good) continue;
    std::fprintf(stderr, "case %ld: a whole step differs from its passes\n", i);
    return 1;
  }
  std::printf("%ld cases, checksum %016llx\n", cases, static_cast<unsigned long long>(checksum));
}
