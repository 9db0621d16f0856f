// What the Krylov passes on CUDA share: where a piece of a sample lies, and sums over it. A piece is a chunk of a
// sample's N entries, cut as in the step: a warp owns a short sample, a thread block a chunk of a long one.
#pragma once
#include "cuda/sums.cuh"
#include "hessenberg.h"
#include "krylov_device.h"

namespace pydeqsolve {
namespace {

struct Span {
  std::int64_t sample, chunk;
  std::int64_t begin, end;  // entries of the sample

  __device__ Span(const Plan& plan, std::int64_t N, std::int64_t piece) {
    sample = plan.chunks == 1 ? piece : piece / plan.chunks;
    chunk = piece - sample * plan.chunks;
    begin = chunk * plan.length;
    end = begin + plan.length < N ? begin + plan.length : N;
  }
};

// The workspace: numbers of thread blocks that count, then of every sample the totals of a pass, then sums of chunks.
constexpr int kCounters = 128;
struct Workspace {
  std::int64_t B, most;
  double* memory;

  __device__ explicit Workspace(const KrylovCall& c) : B(c.B), most(c.most), memory(c.workspace) {}
  // Of one sample: components h (most), again (most), |w|^2 before and after the second subtraction. Small passes and
  // coordinates use its beginning.
  __device__ double* totals(std::int64_t i) const { return memory + kCounters * kKrylovCounts + i * (2 * most + 2); }
  __device__ double* part(std::int64_t i, int value, std::int64_t chunks) const {
    return totals(B) + (i * (most + 1) + value) * chunks;
  }
};
constexpr std::int64_t totals_doubles(std::int64_t most) { return 2 * most + 2; }

// Adds each thread's values over the team, `count` of them to out, shared. parts: kValues doubles of each warp, shared.
template <int kValues>
__device__ inline void add_values(const Team& team, const double (&values)[kValues], int count, double* parts,
                                  double* out) {
  const int warps = team.size / kWarp, warp = team.rank / kWarp;
  add_over_warp(values, team.rank % kWarp, parts + warp * kValues);
  team.sync();
  for (int v = team.rank; v < count; v += team.size) {
    double sum = parts[v];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) sum += parts[w * kValues + v];
    out[v] = sum;
  }
  team.sync();
}

// The same for maxima of numbers that are not negative.
template <int kValues>
__device__ inline void max_values(const Team& team, const double (&values)[kValues], double* parts, double* out) {
  const int warps = team.size / kWarp, warp = team.rank / kWarp;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const double most = max_over_warp(values[v]);
    if (team.rank % kWarp == 0) parts[warp * kValues + v] = most;
  }
  team.sync();
  for (int v = team.rank; v < kValues; v += team.size) {
    double most = parts[v];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) most = larger(most, parts[w * kValues + v]);
    out[v] = most;
  }
  team.sync();
}

// Sums, or maxima, of what the chunks of one sample have left, by a thread block; value v to out[v], `count` of them.
__device__ inline void add_chunks(const Team& team, const Workspace& workspace, std::int64_t i, std::int64_t chunks,
                                  int count, bool maxima, double* out) {
  const int warp = team.rank / kWarp, lane = team.rank % kWarp;
  for (int v = warp; v < count; v += team.size / kWarp) {
    const double* const part = workspace.part(i, v, chunks);
    double sum[1] = {0};
    for (std::int64_t c = lane; c < chunks; c += kWarp) sum[0] = maxima ? larger(sum[0], part[c]) : sum[0] + part[c];
    if (maxima) {
      const double most = max_over_warp(sum[0]);
      if (lane == 0) out[v] = most;
    } else {
      add_over_warp(sum, lane, out + v);
    }
  }
  team.sync();
}

}  // namespace
}  // namespace pydeqsolve
