// The Krylov passes on CUDA that sum a few numbers over every sample, settle it, and write its entries: begin, accept,
// raise, lower, remeasure. A pass is constructed by each thread before it adds, and again before it writes.
#pragma once
#include "cuda/krylov_sums.cuh"

namespace pydeqsolve {
namespace {

struct KrylovEntry {
  const KrylovCall& call;
  KrylovSample& sample;

  __device__ KrylovEntry(const KrylovCall& call, std::int64_t i) : call(call), sample(call.samples[i]) {}
};

// The largest |g|, and whether all are finite; kept in the sample for `Start`.
template <class Scalar>
struct Scan : KrylovEntry {
  static constexpr int kValues = 2;
  static constexpr bool kMaxima = true, kWrites = false;
  bool out;

  __device__ Scan(const KrylovCall& call, std::int64_t i) : KrylovEntry(call, i), out(call.mask && !call.mask[i]) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    if (out) return;
    const double x = magnitude(double{static_cast<const Scalar*>(call.g)[e]});
    own[0] = larger(x, own[0]);
    if (!(x < INFINITY)) own[1] = 1;
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    KrylovSample s{};
    s.out = call.mask && !call.mask[i];
    s.norm = totals[0], s.lost = totals[1] != 0;
    call.samples[i] = s;
  }
};

// The scaled system, and q_0.
template <class Scalar>
struct Start : KrylovEntry {
  static constexpr int kValues = 1;
  static constexpr bool kMaxima = false, kWrites = true;
  Power down;

  __device__ Start(const KrylovCall& call, std::int64_t i)
      : KrylovEntry(call, i), down(-exponent_of(sample.out || sample.lost ? 1 : sample.norm)) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    if (sample.out || sample.lost) return;
    const double x = static_cast<Scalar>(down(double{static_cast<const Scalar*>(call.g)[e]}));
    own[0] = fma(x, x, own[0]);
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    const KrylovTolerance asked{call.rtol, call.atol, call.rtols, call.atols, call.rounding};
    const KrylovSample& s = call.samples[i];
    KrylovSample system = system_of(s.out, s.norm, s.lost, totals[0], asked, i);
    start_cycle(system, system.best);
    call.samples[i] = system;
    if (i == 0) call.vectors[0] = call.next;
  }
  __device__ void write(std::int64_t e) const {
    Scalar* const q = static_cast<Scalar*>(call.next);
    if (!sample.active) {
      q[e] = 0;
    } else {
      const Scalar g = static_cast<Scalar>(Power(-sample.exponent)(double{static_cast<const Scalar*>(call.g)[e]}));
      q[e] = static_cast<Scalar>(g / sample.norm);
    }
  }
};

// g + A u - u of one entry, and its square and that of u.
template <class Scalar>
__device__ inline double residual(const KrylovEntry& at, const Power& down, std::int64_t e, const void* u,
                                  const void* product) {
  const double x = static_cast<const Scalar*>(u)[e], p = static_cast<const Scalar*>(product)[e];
  const double g = static_cast<Scalar>(down(double{static_cast<const Scalar*>(at.call.g)[e]}));
  return g + p - x;
}
template <class Scalar>
__device__ inline void measure_entry(const KrylovEntry& at, const Power& down, std::int64_t e, const void* u,
                                     const void* product, double& squares, double& length) {
  const double x = static_cast<const Scalar*>(u)[e], r = residual<Scalar>(at, down, e, u, product);
  squares = fma(r, r, squares);
  length = fma(x, x, length);
}

template <class Scalar>
struct Accept : KrylovEntry {
  static constexpr int kValues = 4;
  static constexpr bool kMaxima = false, kWrites = true;
  Power down;

  __device__ Accept(const KrylovCall& call, std::int64_t i) : KrylovEntry(call, i), down(-sample.exponent) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    if (!sample.active) return;
    measure_entry<Scalar>(*this, down, e, call.u1, call.product, own[0], own[1]);
    if (call.u2) measure_entry<Scalar>(*this, down, e, call.u2, call.product2, own[2], own[3]);
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    accept_sample(call.samples[i], totals, call.u2 != nullptr, call.eps);
  }
  __device__ void write(std::int64_t e) const {
    const bool second = sample.chosen == 2;
    const void* const taken = second ? call.u2 : call.u1;
    Scalar *const q = static_cast<Scalar*>(call.next), *const u = static_cast<Scalar*>(call.u);
    q[e] = 0;
    if (sample.active) {
      const double r = residual<Scalar>(*this, down, e, taken, second ? call.product2 : call.product);
      q[e] = static_cast<Scalar>(r / sample.left);
    }
    if (sample.chosen > 0) u[e] = static_cast<const Scalar*>(taken)[e];
    if (sample.chosen == 0 && u == call.u1) u[e] = 0;
  }
};

template <class Scalar>
struct Raise : KrylovEntry {
  static constexpr int kValues = 1;
  static constexpr bool kMaxima = false, kWrites = false;
  Power up, down;

  __device__ Raise(const KrylovCall& call, std::int64_t i)
      : KrylovEntry(call, i), up(sample.exponent), down(-sample.exponent) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    Scalar& u = static_cast<Scalar*>(call.u)[e];
    const Scalar before = u, after = static_cast<Scalar>(up(double{before}));
    u = after;
    if (static_cast<Scalar>(down(double{after})) != before) own[0] += 1;
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    raise_sample(call.samples[i], totals[0]);
  }
};

template <class Scalar>
struct Lower : KrylovEntry {
  static constexpr int kValues = 2;
  static constexpr bool kMaxima = false, kWrites = true;

  __device__ Lower(const KrylovCall& call, std::int64_t i) : KrylovEntry(call, i) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    const Scalar value = static_cast<const Scalar*>(call.values)[e];
    const Scalar* const raised = static_cast<const Scalar*>(call.raised);
    if (!(magnitude(double{value}) < INFINITY)) own[0] += 1;
    if (raised && value != raised[e]) own[1] += 1;
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    lower_sample(call.samples[i], totals[0], totals[1]);
  }
  __device__ void write(std::int64_t e) const {
    Scalar& value = static_cast<Scalar*>(call.values)[e];
    value = sample.chosen ? static_cast<Scalar>(Power(-sample.exponent)(double{value})) : Scalar(0);
  }
};

template <class Scalar>
struct Remeasure : KrylovEntry {
  static constexpr int kValues = 2;
  static constexpr bool kMaxima = false, kWrites = false;
  Power down;

  __device__ Remeasure(const KrylovCall& call, std::int64_t i) : KrylovEntry(call, i), down(-sample.exponent) {}
  __device__ void add(std::int64_t e, double (&own)[kValues]) const {
    measure_entry<Scalar>(*this, down, e, call.u1, call.product, own[0], own[1]);
  }
  __device__ static void settle(const KrylovCall& call, std::int64_t i, const double* totals) {
    KrylovSample& s = call.samples[i];
    if (s.changed && s.best < INFINITY) s.best = square_root(totals[0]);
  }
};

template <class Pass>
__device__ inline void write_entries(const Team& team, const KrylovCall& call, const Span& span) {
  const Pass pass(call, span.sample);
  const std::int64_t row = span.sample * call.N;
  for (std::int64_t e = row + span.begin + team.rank; e < row + span.end; e += team.size) pass.write(e);
}

__host__ __device__ inline int pass_doubles(int values, int team) { return values * (team / kWarp + 1); }

// Where a sample is one chunk, all of a pass; else the sums of a chunk, to the workspace. A team owns a piece.
template <class Pass>
__global__ void __launch_bounds__(kThreads, 2) pass_kernel(KrylovCall call, Plan plan) {
  PYDEQSOLVE_SHARED(memory);
  const Team team(plan.team);
  if (team.piece < plan.pieces) {
    const Span span(plan, call.N, team.piece);
    double* const totals = memory + team.index * pass_doubles(Pass::kValues, team.size);
    double own[Pass::kValues] = {};
    {
      const Pass pass(call, span.sample);
      const std::int64_t row = span.sample * call.N;
      for (std::int64_t e = row + span.begin + team.rank; e < row + span.end; e += team.size) pass.add(e, own);
    }
    if constexpr (Pass::kMaxima) {
      max_values(team, own, totals + Pass::kValues, totals);
    } else {
      add_values(team, own, Pass::kValues, totals + Pass::kValues, totals);
    }
    if (plan.chunks > 1) {
      const Workspace workspace(call);
      for (int v = team.rank; v < Pass::kValues; v += team.size) {
        *(workspace.part(span.sample, v, plan.chunks) + span.chunk) = totals[v];
      }
    } else {
      if (team.rank == 0) Pass::settle(call, span.sample, totals);
      team.sync();
      if constexpr (Pass::kWrites) write_entries<Pass>(team, call, span);
    }
  }
}

// The end of the sums of several chunks. A thread block owns a sample.
template <class Pass>
__global__ void __launch_bounds__(kThreads, 2) pass_total_kernel(KrylovCall call, std::int64_t chunks) {
  PYDEQSOLVE_SHARED(totals);
  const Team team(kThreads);
  add_chunks(team, Workspace(call), team.piece, chunks, Pass::kValues, Pass::kMaxima, totals);
  if (team.rank == 0) Pass::settle(call, team.piece, totals);
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, 2) pass_write_kernel(KrylovCall call, Plan plan) {
  const Team team(plan.team);
  write_entries<Pass>(team, call, Span(plan, call.N, team.piece));
}

// A thread owns a sample. Whether it failed is left in `chosen`, to be counted.
__global__ void __launch_bounds__(kThreads) tell_kernel(KrylovCall call) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= call.B) return;
  const KrylovJudgement rule{call.adjoint != 0, call.follows != 0, call.rounding};
  KrylovSample& s = call.samples[i];
  s.chosen = tell_sample(s, rule, i, call.status, call.residual, call.evaluations);
}

// Counts samples; a thread block takes every gridDim-th 256 of them.
__global__ void __launch_bounds__(kThreads) count_kernel(KrylovCall call) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  double own[kKrylovCounts] = {};
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < call.B;
       i += std::int64_t{gridDim.x} * kThreads) {
    const KrylovSample& s = call.samples[i];
    own[kGoing] += s.going;
    own[kActive] += s.active;
    own[kUnsound] += s.active && s.sound < s.taken;
    own[kChanged] += s.changed;
    own[kFailed] += s.chosen == 1;
  }
  add_values(team, own, kKrylovCounts, shared + kKrylovCounts, shared);
  if (team.rank < kKrylovCounts) {
    if (gridDim.x == 1) {
      call.counts[team.rank] = static_cast<std::int64_t>(shared[team.rank]);
    } else {
      call.workspace[blockIdx.x * kKrylovCounts + team.rank] = shared[team.rank];
    }
  }
}
// Adds up what several thread blocks have counted.
__global__ void __launch_bounds__(kThreads) count_total_kernel(KrylovCall call, int blocks) {
  if (threadIdx.x >= kKrylovCounts) return;
  double sum = 0;
  for (int b = 0; b < blocks; ++b) sum += call.workspace[b * kKrylovCounts + threadIdx.x];
  call.counts[threadIdx.x] = static_cast<std::int64_t>(sum);
}

}  // namespace
}  // namespace pydeqsolve
