// Launches of the CUDA step: how each pass is cut into thread blocks. Nothing here allocates or waits, so a step can be
// captured in a graph.
#include <cstdint>
#include <initializer_list>

#include "core.h"
#include "cuda/gram.cuh"
#include "cuda/judge.cuh"
#include "cuda/mix.cuh"
#include "cuda/totals.cuh"
#include "cuda/weights.cuh"
#include "step.h"

namespace pydeqsolve {
namespace {

// Up to here a warp owns a block: a thousand blocks of 64 features fill the device with a thousand warps, and need no
// barrier wider than a warp.
constexpr std::int64_t kWarpFeatures = 1024;
// Beyond, a thread block owns a chunk of this many features, four packs of float per thread: 3 million features of one
// sample make 750 chunks, several for each multiprocessor, and the last wave of them is short.
constexpr std::int64_t kChunkFeatures = 4096;
constexpr std::int64_t kKeptBytes = 64 * 1024;  // of a left behind iterate that one thread block copies
constexpr int kSharedBytes = 48 * 1024;         // every device has as much without being asked
// Systems up to here are solved inside the mix kernel, larger ones only where no other chunk would solve them too.
constexpr int kSolveInMix = 8, kSolveInMixAlone = 16;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t chunks_of(std::int64_t features) {
  return features <= kWarpFeatures ? 1 : divide_up(features, kChunkFeatures);
}

bool aligned(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % 16 == 0;
}

// strides: all that there are besides D, or-ed together.
template <class Scalar>
Plan plan_of(const Rows& rows, std::int64_t strides, std::initializer_list<const void*> pointers) {
  constexpr int kSize = Pack<Scalar>::kSize;
  const std::int64_t D = rows.features, chunks = chunks_of(D);
  const std::int64_t length = divide_up(divide_up(D, chunks), kSize) * kSize;
  const bool vector = (D | strides) % kSize == 0 && aligned(pointers);
  return {rows.n * rows.blocks * chunks, chunks, length, D <= kWarpFeatures ? kWarp : kThreads, vector};
}

struct Shape {
  unsigned grid;
  unsigned threads;
  std::size_t shared;  // bytes
};

// As many teams per thread block as fit 256 threads, shared memory and the work at hand. A grid may have 2^31 - 1
// thread blocks, more than there are histories in any device's memory, so no thread has to loop over pieces; that would
// keep loop invariants in registers which the sums need.
Shape shape_of(std::int64_t pieces, int team, int shared_doubles) {
  const int bytes = shared_doubles * static_cast<int>(sizeof(double));
  std::int64_t teams = kThreads / team;
  if (teams * bytes > kSharedBytes) teams = bytes < kSharedBytes ? kSharedBytes / bytes : 1;
  if (teams > pieces) teams = pieces;
  return {static_cast<unsigned>(divide_up(pieces, teams)), static_cast<unsigned>(teams * team),
          static_cast<std::size_t>(teams * bytes)};
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What the kernels that read no rows take of a history: they are compiled once for all storage types.
template <class Scalar>
History<void> matrices_of(const History<Scalar>& h) {
  return {h.slots, h.head, h.kind, 0, 0, nullptr, nullptr, h.gram, h.steps_gram, h.rhs, h.squares, h.count, h.eps};
}

template <class Scalar, int kAges, bool kMany, bool kSteps>
const char* launch_measure(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z,
                           double* norms, Norm norm, double* partial, cudaStream_t stream) {
  const Plan plan = plan_of<Scalar>(rows, history.sample_stride | history.slot_stride, {history.R, history.F, f, z});
  const Shape shape = shape_of(plan.pieces, plan.team, measure_shared_doubles<kAges, kSteps>(history.slots, plan.team));
  const auto measure = plan.vector ? measure_kernel<Scalar, kAges, kMany, kSteps, true>
                                   : measure_kernel<Scalar, kAges, kMany, kSteps, false>;
  PYDEQSOLVE_LAUNCH(measure, shape.grid, shape.threads, shape.shared, stream, rows, history, plan, f, z, norms, norm,
                    partial);
  const char* error = launched();
  if (error || plan.chunks == 1) return error;
  const std::int64_t blocks = rows.n * rows.blocks;
  const Shape last = shape_of(blocks, kThreads, Sums<kSteps>::size(history.slots));
  const auto finish = finish_kernel<kSteps>;
  PYDEQSOLVE_LAUNCH(finish, last.grid, last.threads, last.shared, stream, rows, matrices_of(history), blocks,
                    plan.chunks, partial, norms, norm);
  return launched();
}

// Whether every block has a system of its own.
bool separate(const Rows& rows, Coupling coupling) { return coupling == Coupling::kIndependent || rows.blocks == 1; }

template <class Scalar>
const char* launch_mix(const Rows& rows, const History<Scalar>& history, bool solve, double ridge,
                       const std::uint8_t* mode, const double* given, double* gamma, std::int32_t* dropped, double beta,
                       const Scalar* z, Scalar* z_next, cudaStream_t stream) {
  const Plan plan =
      plan_of<Scalar>(rows, history.sample_stride | history.slot_stride, {history.R, history.F, z, z_next});
  if (plan.pieces == 0) return nullptr;
  const Shape shape = shape_of(plan.pieces, plan.team, mix_shared_doubles(history.slots, solve));
  const auto mix = beta == 1 ? mix_kernel<Scalar, false> : mix_kernel<Scalar, true>;
  PYDEQSOLVE_LAUNCH(mix, shape.grid, shape.threads, shape.shared, stream, rows, history, plan, solve, ridge, mode,
                    given, gamma, dropped, beta, z, z_next);
  return launched();
}

}  // namespace

template <class Scalar>
const char* measure_cuda(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z,
                         double* norms, Norm norm, double* partial, void* stream) {
  if (rows.n * rows.blocks == 0) return nullptr;
  const bool steps = history.kind == Kind::kAndersonI || history.kind == Kind::kBroydenGood;
  const int memory = history.slots - 1;
  auto* launch = launch_measure<Scalar, 16, true, false>;
  if (steps) {
    launch = memory <= 4 ? launch_measure<Scalar, 4, false, true> : launch_measure<Scalar, 8, true, true>;
  } else if (memory <= 16) {
    launch = memory <= 4   ? launch_measure<Scalar, 4, false, false>
             : memory <= 8 ? launch_measure<Scalar, 8, false, false>
                           : launch_measure<Scalar, 16, false, false>;
  }
  return launch(rows, history, f, z, norms, norm, partial, static_cast<cudaStream_t>(stream));
}

template <class Scalar>
const char* weights_cuda(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                         const std::uint8_t* mode, double* gamma, std::int32_t* dropped, double* workspace,
                         void* stream) {
  const std::int64_t blocks = rows.n * rows.blocks;
  if (blocks == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const int m = history.slots - 1;
  const History<void> matrices = matrices_of(history);
  const bool summed = !separate(rows, coupling) && m > 0, totals = summed && coupling == Coupling::kJoint;
  if (summed) {
    const std::int64_t pieces = rows.n * divide_up(summed_doubles(m), kWarp);
    const Shape shape = shape_of(pieces, kThreads, 0);
    PYDEQSOLVE_LAUNCH(sum_kernel, shape.grid, kSumThreads, kSumThreads * sizeof(double), on, rows, matrices, !totals,
                      mode, workspace);
    if (const char* error = launched()) return error;
  }
  const Shape shape = shape_of(totals ? rows.n : blocks, kWarp, system_doubles(m));
  PYDEQSOLVE_LAUNCH(weights_kernel, shape.grid, shape.threads, shape.shared, on, rows, matrices,
                    summed && !totals ? workspace : nullptr, totals ? workspace : nullptr, ridge, mode, gamma, dropped);
  return launched();
}

template <class Scalar>
const char* mix_cuda(const Rows& rows, const History<Scalar>& history, const double* gamma, const std::uint8_t* mode,
                     double beta, const Scalar* z, Scalar* z_next, void* stream) {
  return launch_mix<Scalar>(rows, history, false, 0, mode, gamma, nullptr, nullptr, beta, z, z_next,
                            static_cast<cudaStream_t>(stream));
}

template <class Scalar>
const char* advance_cuda(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                         const std::uint8_t* mode, double* gamma, std::int32_t* dropped, double beta, const Scalar* z,
                         Scalar* z_next, double* workspace, void* stream) {
  const int most = chunks_of(rows.features) == 1 ? kSolveInMixAlone : kSolveInMix;
  if (separate(rows, coupling) && history.slots - 1 <= most) {
    return launch_mix<Scalar>(rows, history, true, ridge, mode, nullptr, gamma, dropped, beta, z, z_next,
                              static_cast<cudaStream_t>(stream));
  }
  const char* error = weights_cuda<Scalar>(rows, history, coupling, ridge, mode, gamma, dropped, workspace, stream);
  return error ? error : mix_cuda<Scalar>(rows, history, gamma, mode, beta, z, z_next, stream);
}

const char* judge_cuda(std::int64_t n, std::int64_t T, const double* norms, const std::int32_t* dropped, Record* table,
                       const Judgement& rule, std::uint8_t* mode, void* stream) {
  if (n * T == 0) return nullptr;
  const Shape shape = shape_of(n, kWarp, kJudged);
  PYDEQSOLVE_LAUNCH(judge_kernel, shape.grid, shape.threads, shape.shared, static_cast<cudaStream_t>(stream), n, T,
                    norms, dropped, table, rule, mode);
  return launched();
}

const char* keep_cuda(std::int64_t n, std::int64_t bytes, const Record* table, const std::int64_t* rows,
                      const void* from, void* to, void* stream) {
  if (n * bytes == 0) return nullptr;
  const auto run = [&](auto word) {
    using Word = decltype(word);
    const std::int64_t words = bytes / static_cast<std::int64_t>(sizeof(Word)), chunks = divide_up(bytes, kKeptBytes);
    const auto keep = keep_kernel<Word>;
    PYDEQSOLVE_LAUNCH(keep, static_cast<unsigned>(n * chunks), kThreads, 0, static_cast<cudaStream_t>(stream), chunks,
                      words, table, rows, static_cast<const Word*>(from), static_cast<Word*>(to));
    return launched();
  };
  return bytes % 16 == 0 && aligned({from, to}) ? run(Pack<float>{}) : run(std::uint16_t{});
}

// What the larger of the two passes needs: the sums of every chunk, or the systems summed over time.
std::int64_t partial_doubles(const Rows& rows, int slots) {
  const std::int64_t blocks = rows.n * rows.blocks, chunks = chunks_of(rows.features);
  const std::int64_t sums = chunks == 1 ? 0 : blocks * chunks * Sums<true>::size(slots);
  const std::int64_t systems = rows.blocks == 1 ? 0 : blocks * summed_doubles(slots - 1);
  return sums > systems ? sums : systems;
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // "no driver" is an answer here, not an error for the next launch to find
  return 0;
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                           \
  template const char* measure_cuda<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*,   \
                                            double*, Norm, double*, void*);                                      \
  template const char* weights_cuda<Scalar>(const Rows&, const History<Scalar>&, Coupling, double,               \
                                            const std::uint8_t*, double*, std::int32_t*, double*, void*);        \
  template const char* mix_cuda<Scalar>(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, \
                                        double, const Scalar*, Scalar*, void*);                                  \
  template const char* advance_cuda<Scalar>(const Rows&, const History<Scalar>&, Coupling, double,               \
                                            const std::uint8_t*, double*, std::int32_t*, double, const Scalar*,  \
                                            Scalar*, double*, void*);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)
PYDEQSOLVE_INSTANTIATE(BFloat16)
PYDEQSOLVE_INSTANTIATE(Half)

}  // namespace pydeqsolve
