// Launches of the CUDA step. Nothing here allocates or waits, so a step can be captured in a graph.
#include <cstdint>
#include <initializer_list>

#include "core.h"
#include "cuda/gram.cuh"
#include "cuda/judge.cuh"
#include "cuda/launch.cuh"
#include "cuda/mix.cuh"
#include "cuda/totals.cuh"
#include "cuda/weights.cuh"
#include "step.h"

namespace pydeqsolve {
namespace {

constexpr std::int64_t kKeptBytes = 64 * 1024;  // of a left behind iterate that one thread block copies
// Systems up to here are solved inside the mix kernel, larger ones only where no other chunk would solve them too.
constexpr int kSolveInMix = 8, kSolveInMixAlone = 16;

// pointers: to what the pass reads and writes besides R and F.
template <class Scalar>
Plan plan_of(const Call& call, std::initializer_list<const void*> pointers) {
  constexpr int kSize = Pack<Scalar>::kSize;
  const Ring& ring = call.ring;
  const std::int64_t D = ring.features, chunks = chunks_of(D);
  const std::int64_t length = divide_up(divide_up(D, chunks), kSize) * kSize;
  const bool vector =
      (D | ring.sample_stride | ring.slot_stride) % kSize == 0 && aligned({ring.R, ring.F}) && aligned(pointers);
  return {call.n * ring.blocks * chunks, chunks, length, D <= kWarpFeatures ? kWarp : kThreads, vector};
}

cudaStream_t stream_of(const Call& call) { return static_cast<cudaStream_t>(call.stream); }

template <class Scalar, int kAges, bool kMany, bool kSteps>
const char* launch_measure(const Call& call) {
  const int slots = call.ring.slots;
  const Plan plan = plan_of<Scalar>(call, {call.f, call.z});
  const Shape shape = shape_of(plan.pieces, plan.team, measure_shared_doubles<kAges, kSteps>(slots, plan.team));
  const auto measure = plan.vector ? measure_kernel<Scalar, kAges, kMany, kSteps, true>
                                   : measure_kernel<Scalar, kAges, kMany, kSteps, false>;
  PYDEQSOLVE_LAUNCH(measure, shape.grid, shape.threads, shape.shared, stream_of(call), call, plan);
  const char* error = launched();
  if (error || plan.chunks == 1) return error;
  const std::int64_t blocks = call.n * call.ring.blocks;
  const Shape last = shape_of(blocks, kThreads, Sums<kSteps>::size(slots));
  const auto finish = finish_kernel<kSteps>;
  PYDEQSOLVE_LAUNCH(finish, last.grid, last.threads, last.shared, stream_of(call), call, blocks, plan.chunks);
  return launched();
}

template <class Scalar>
const char* measure(const Call& call) {
  const Kind kind = call.ring.kind;
  const bool steps = kind == Kind::kAndersonI || kind == Kind::kBroydenGood;
  const int memory = call.ring.slots - 1;
  if (steps) {
    return memory <= 4 ? launch_measure<Scalar, 4, false, true>(call) : launch_measure<Scalar, 8, true, true>(call);
  }
  return memory <= 4    ? launch_measure<Scalar, 4, false, false>(call)
         : memory <= 8  ? launch_measure<Scalar, 8, false, false>(call)
         : memory <= 16 ? launch_measure<Scalar, 16, false, false>(call)
                        : launch_measure<Scalar, 16, true, false>(call);
}

// With `solve` each block's team solves its small system itself; else gamma is given.
template <class Scalar>
const char* launch_mix(const Call& call, bool solve) {
  const Plan plan = plan_of<Scalar>(call, {call.z, call.z_next});
  if (plan.pieces == 0) return nullptr;
  const Shape shape = shape_of(plan.pieces, plan.team, mix_shared_doubles(call.ring.slots, solve));
  const auto mix = call.ring.damping == 1 ? mix_kernel<Scalar, false> : mix_kernel<Scalar, true>;
  PYDEQSOLVE_LAUNCH(mix, shape.grid, shape.threads, shape.shared, stream_of(call), call, plan, solve);
  return launched();
}

// Whether every block has a system of its own.
bool separate(const Ring& ring) { return ring.coupling == Coupling::kIndependent || ring.blocks == 1; }

const char* measure_all(const Call& call) {
  if (call.n * call.ring.blocks == 0) return nullptr;
  const char* error = nullptr;
  with_scalar(call.ring.storage, [&](auto scalar) { error = measure<decltype(scalar)>(call); });
  return error;
}

const char* weights_all(const Call& call) {
  const Ring& ring = call.ring;
  const std::int64_t blocks = call.n * ring.blocks;
  if (blocks == 0) return nullptr;
  const int m = ring.slots - 1;
  const bool summed = !separate(ring) && m > 0, totals = summed && ring.coupling == Coupling::kJoint;
  if (summed) {
    const std::int64_t pieces = call.n * divide_up(summed_doubles(m), kWarp);
    const Shape shape = shape_of(pieces, kThreads, 0);
    PYDEQSOLVE_LAUNCH(sum_kernel, shape.grid, kSumThreads, kSumThreads * sizeof(double), stream_of(call), call,
                      !totals);
    if (const char* error = launched()) return error;
  }
  const Shape shape = shape_of(totals ? call.n : blocks, kWarp, system_doubles(m));
  const double* const nothing = nullptr;
  PYDEQSOLVE_LAUNCH(weights_kernel, shape.grid, shape.threads, shape.shared, stream_of(call), call,
                    summed && !totals ? call.workspace : nothing, totals ? call.workspace : nothing);
  return launched();
}

const char* mix_any(const Call& call, bool solve) {
  const char* error = nullptr;
  with_scalar(call.ring.storage, [&](auto scalar) { error = launch_mix<decltype(scalar)>(call, solve); });
  return error;
}

const char* mix_all(const Call& call) { return mix_any(call, false); }

const char* advance_all(const Call& call) {
  const int most = chunks_of(call.ring.features) == 1 ? kSolveInMixAlone : kSolveInMix;
  if (separate(call.ring) && call.ring.slots - 1 <= most) return mix_any(call, true);
  const char* error = weights_all(call);
  return error ? error : mix_all(call);
}

}  // namespace

const Passes& cuda_passes() {
  static constexpr Passes passes{measure_all, weights_all, mix_all, advance_all, nullptr};
  return passes;
}

const char* judge_cuda(const Call& call) {
  if (call.n * call.ring.blocks == 0) return nullptr;
  const Shape shape = shape_of(call.n, kWarp, kJudged);
  PYDEQSOLVE_LAUNCH(judge_kernel, shape.grid, shape.threads, shape.shared, stream_of(call), call);
  return launched();
}

const char* keep_cuda(std::int64_t n, std::int64_t bytes, const Sample* table, const std::int64_t* rows,
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
std::int64_t workspace_doubles(const Ring& ring, std::int64_t n) {
  const std::int64_t blocks = n * ring.blocks, chunks = chunks_of(ring.features);
  const std::int64_t sums = chunks == 1 ? 0 : blocks * chunks * Sums<true>::size(ring.slots);
  const std::int64_t systems = ring.blocks == 1 ? 0 : blocks * summed_doubles(ring.slots - 1);
  return sums > systems ? sums : systems;
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // "no driver" is an answer here, not an error for the next launch to find
  return 0;
}

}  // namespace pydeqsolve
