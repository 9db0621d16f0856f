// The small systems of coupled blocks on CUDA: sums over time, up to each block or over all.
#pragma once
#include "cuda/pieces.cuh"

namespace pydeqsolve {
namespace {

constexpr int kSumThreads = 1024;  // of a thread block that sums over time
constexpr int kSumSegments = kSumThreads / kWarp;

__host__ __device__ inline int summed_doubles(int m) { return m * m + m + 2; }

// Sums the small systems over time. A thread block owns 32 entries of one sample's systems, a warp a segment of time,
// a lane one entry. The workspace (n, T, E) holds prefix sums for a causal coupling, (n, E) totals for a joint one,
// where E = m² + m + 2: A by rows, b, the squares of r and f. Reads the counts of mixing blocks only.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(Call call, bool prefix) {
  PYDEQSOLVE_SHARED(totals);  // (segments, 32)
  const Ring& ring = call.ring;
  const std::uint8_t* const mode = call.mode;
  double* const systems = call.workspace;
  const int m = ring.slots - 1, entries = summed_doubles(m), groups = (entries + kWarp - 1) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t T = ring.blocks, segment = (T + kSumSegments - 1) / kSumSegments;
  const std::int64_t begin = warp * segment < T ? warp * segment : T, end = begin + segment < T ? begin + segment : T;
  const std::int64_t i = blockIdx.x / groups, sample = call.rows ? call.rows[i] : i;
  const int entry = static_cast<int>(blockIdx.x % groups) * kWarp + lane;
  const bool in_rhs = entry >= m * m, inside = entry < entries;
  const int square = entry - m * m - m;  // which of the two, or negative
  const int row = in_rhs ? entry - m * m : entry / m, column = in_rhs ? 0 : entry % m;
  const auto term = [&](std::int64_t t) {
    const std::int64_t at = sample * T + t;
    if (!inside || mode[i * T + t] != kMix) return 0.0;
    if (square >= 0) return ring.squares[2 * at + square];
    const int differences = ring.count[at] - 1;
    if (row >= differences || column >= differences) return 0.0;
    if (in_rhs) return ring.rhs[at * ring.slots + row];
    const std::int64_t gram = at * ring.slots * ring.slots;
    return system_entry(ring.kind, row, column, ring.head, ring.slots, ring.gram + gram,
                        ring.steps_gram ? ring.steps_gram + gram : nullptr);
  };
  double total = 0;
#pragma unroll 4
  for (std::int64_t t = begin; t < end; ++t) total += term(t);
  totals[threadIdx.x] = total;
  __syncthreads();
  double sum = 0;
  const int earlier = prefix ? warp : kSumSegments;
  for (int w = 0; w < earlier; ++w) sum += totals[w * kWarp + lane];
  if (prefix && inside) {
#pragma unroll 4
    for (std::int64_t t = begin; t < end; ++t) {
      sum += term(t);
      systems[(i * T + t) * entries + entry] = sum;
    }
  } else if (inside && warp == 0) {
    systems[i * entries + entry] = sum;
  }
}

}  // namespace
}  // namespace pydeqsolve
