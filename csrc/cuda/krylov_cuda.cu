// Launches of the adjoint's Krylov passes on CUDA: one for a sample of one chunk, a few for longer ones. Nothing here
// allocates or waits.
#include "cuda/krylov_append.cuh"
#include "cuda/krylov_passes.cuh"
#include "cuda/launch.cuh"

namespace pydeqsolve {
namespace {

cudaStream_t stream_of(const KrylovCall& call) { return static_cast<cudaStream_t>(call.stream); }

template <class Scalar>
Plan plan_of(const KrylovCall& call, std::initializer_list<const void*> pointers) {
  constexpr int kSize = Pack<Scalar>::kSize;
  const std::int64_t N = call.N, chunks = chunks_of(N), length = divide_up(divide_up(N, chunks), kSize) * kSize;
  const bool vector = N % kSize == 0 && call.aligned && aligned(pointers);
  return {call.B * chunks, chunks, length, N <= kWarpFeatures ? kWarp : kThreads, vector};
}

template <class Kernel, class... Arguments>
const char* launch(const Kernel& kernel, const Shape& shape, const KrylovCall& call, const Arguments&... arguments) {
  PYDEQSOLVE_LAUNCH(kernel, shape.grid, shape.threads, shape.shared, stream_of(call), call, arguments...);
  return launched();
}

template <class Pass, class Scalar>
const char* run_pass(const KrylovCall& call) {
  const Plan plan = plan_of<Scalar>(call, {});
  const Shape shape = shape_of(plan.pieces, plan.team, pass_doubles(Pass::kValues, plan.team));
  const char* error = launch(pass_kernel<Pass>, shape, call, plan);
  if (error || plan.chunks == 1) return error;
  error = launch(pass_total_kernel<Pass>, shape_of(call.B, kThreads, Pass::kValues), call, plan.chunks);
  if constexpr (Pass::kWrites) {
    if (!error) error = launch(pass_write_kernel<Pass>, shape_of(plan.pieces, kThreads, 0), call, plan);
  }
  return error;
}

template <class Scalar>
const char* begin(const KrylovCall& call) {
  const char* error = run_pass<Scan<Scalar>, Scalar>(call);
  return error ? error : run_pass<Start<Scalar>, Scalar>(call);
}

template <class Scalar, bool kVector>
const char* append_as(const KrylovCall& call, const Plan& plan) {
  const Shape shape = shape_of(plan.pieces, plan.team, append_doubles(call.k, plan.team));
  if (plan.chunks == 1) return launch(append_kernel<Scalar, kVector>, shape, call, plan);
  const Shape total = shape_of(call.B, kThreads, append_doubles(call.k, kThreads));
  const char* error = launch(append_part_kernel<Scalar, kVector, 0>, shape, call, plan);
  if (!error) error = launch(append_total_kernel<0>, total, call, plan.chunks);
  if (!error) error = launch(append_part_kernel<Scalar, kVector, 1>, shape, call, plan);
  if (!error) error = launch(append_total_kernel<1>, total, call, plan.chunks);
  if (!error) error = launch(append_part_kernel<Scalar, kVector, 2>, shape, call, plan);
  if (!error) error = launch(append_total_kernel<2>, total, call, plan.chunks);
  if (!error) error = launch(append_part_kernel<Scalar, kVector, 3>, shape, call, plan);
  return error;
}
template <class Scalar>
const char* append(const KrylovCall& call) {
  const Plan plan = plan_of<Scalar>(call, {call.product, call.next});
  return plan.vector ? append_as<Scalar, true>(call, plan) : append_as<Scalar, false>(call, plan);
}

template <class Scalar>
const char* combine(const KrylovCall& call) {
  const int most = static_cast<int>(call.most);
  if (const char* error = launch(coordinates_kernel, shape_of(call.B, kWarp, most), call)) return error;
  const Plan plan = plan_of<Scalar>(call, {call.u, call.next});
  const Shape shape = shape_of(plan.pieces, plan.team, most);
  return plan.vector ? launch(combine_kernel<Scalar, true>, shape, call, plan)
                     : launch(combine_kernel<Scalar, false>, shape, call, plan);
}

const char* count(const KrylovCall& call) {
  const std::int64_t wanted = divide_up(call.B, kThreads);
  const int blocks = static_cast<int>(wanted < kCounters ? wanted : kCounters);
  const Shape shape{static_cast<unsigned>(blocks), kThreads, pass_doubles(kKrylovCounts, kThreads) * sizeof(double)};
  const char* error = launch(count_kernel, shape, call);
  return error || blocks == 1 ? error : launch(count_total_kernel, Shape{1, kWarp, 0}, call, blocks);
}

template <class Scalar>
const char* run(KrylovPass pass, const KrylovCall& call) {
  switch (pass) {
    case KrylovPass::kBegin:
      return begin<Scalar>(call);
    case KrylovPass::kAppend:
      return append<Scalar>(call);
    case KrylovPass::kCombine:
      return combine<Scalar>(call);
    case KrylovPass::kAccept:
      return run_pass<Accept<Scalar>, Scalar>(call);
    case KrylovPass::kRaise:
      return run_pass<Raise<Scalar>, Scalar>(call);
    case KrylovPass::kLower:
      return run_pass<Lower<Scalar>, Scalar>(call);
    case KrylovPass::kRemeasure:
      return run_pass<Remeasure<Scalar>, Scalar>(call);
    case KrylovPass::kJudge:
      return launch(tell_kernel, Shape{static_cast<unsigned>(divide_up(call.B, kThreads)), kThreads, 0}, call);
    case KrylovPass::kCount:
      return count(call);
  }
  return "no such pass";
}

}  // namespace

const char* krylov_cuda(KrylovPass pass, const KrylovCall& call) {
  if (call.B * call.N == 0) return nullptr;
  return call.is_double ? run<double>(pass, call) : run<float>(pass, call);
}

std::int64_t krylov_workspace_doubles(std::int64_t B, std::int64_t N, std::int64_t most) {
  const std::int64_t chunks = chunks_of(N);
  return kCounters * kKrylovCounts + B * totals_doubles(most) + (chunks == 1 ? 0 : B * (most + 1) * chunks);
}

}  // namespace pydeqsolve
