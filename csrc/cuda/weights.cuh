// The small systems on CUDA: a team brings one together, its first thread solves it.
#pragma once
#include "cuda/sums.cuh"
#include "cuda/totals.cuh"

namespace pydeqsolve {
namespace {

// Shared workspace of one small system, in doubles: A, b, scale, order and what was dropped.
__host__ __device__ inline int system_doubles(int m) { return m * m + 2 * m + (m + 2) / 2; }

struct Solved {
  const double* gamma;  // by age, shared
  int dropped;
};

// Solves the system of `size` differences of one block in `work`; all threads of the team take part. `summed` is its
// A (m, m) and b (m,), or null for the block's own Gram.
__device__ inline Solved solve_block(const Team& team, const Ring& ring, std::int64_t at, int size,
                                     const double* summed, double* work) {
  const int M = ring.slots, m = M - 1;
  double *const A = work, *const b = A + m * m, *const scale = b + m;
  int* const order = reinterpret_cast<int*>(scale + m);
  const double *const gram = ring.gram + at * M * M, *const steps_gram =
                                                         ring.steps_gram ? ring.steps_gram + at * M * M : nullptr;
  for (int e = team.rank; e < size * size; e += team.size) {
    const int i = e / size, j = e % size;
    A[e] = summed ? summed[i * m + j] : system_entry(ring.kind, i, j, ring.head, M, gram, steps_gram);
  }
  for (int i = team.rank; i < size; i += team.size) b[i] = summed ? summed[m * m + i] : ring.rhs[at * M + i];
  team.sync();
  if (team.rank == 0) {
    const double* const squares = summed ? summed + m * m + m : ring.squares + 2 * at;
    order[m] = solve_system(ring.kind, size, A, b, scale, order, ring.ridge, squares, ring.eps);
  }
  team.sync();
  return {b, order[m]};
}

// Writes what the solve leaves behind for one block. Only blocks that do not mix have their count changed, and only
// counts of blocks that mix are read, so the order of teams does not matter.
__device__ inline void settle(const Team& team, const Ring& ring, std::int64_t at, std::uint8_t what, int size,
                              const Solved& solved, double* gamma, std::int32_t* dropped) {
  if (what == kMix) {
    for (int a = team.rank; a < ring.slots; a += team.size) gamma[a] = a < size ? solved.gamma[a] : 0;
  }
  if (team.rank == 0) {
    *dropped = what == kMix ? solved.dropped : 0;
    if (what == kReject) ring.count[at] = 0;
    if (what == kPlain) ring.count[at] = 1;
  }
}

// The small systems on their own. A warp owns one: a block's, or with `totals` (n, E) one for all blocks of a sample.
// systems (n, T, E) are the causal sums; both null: every block's own Gram.
__global__ void __launch_bounds__(kThreads, 2) weights_kernel(Call call, const double* systems, const double* totals) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kWarp);
  const Ring& ring = call.ring;
  const std::uint8_t* const mode = call.mode;
  const int M = ring.slots, m = M - 1, entries = summed_doubles(m);
  double* const work = shared + team.index * system_doubles(m);
  const std::int64_t T = ring.blocks, span = totals ? T : 1;
  const std::int64_t block = team.piece * span;
  if (block < call.n * T) {
    const std::int64_t i = block / T, sample = call.rows ? call.rows[i] : i, at = sample * T + block - i * T;
    double most = 0;
    for (std::int64_t t = team.rank; t < span; t += kWarp) {
      if (mode[block + t] == kMix) most = larger(most, ring.count[at + t] - 1);
    }
    const int size = static_cast<int>(max_over_warp(most));
    const double* summed = totals ? totals + i * entries : systems ? systems + block * entries : nullptr;
    const Solved solved = solve_block(team, ring, at, size, summed, work);
    for (std::int64_t t = 0; t < span; ++t) {
      settle(team, ring, at + t, mode[block + t], size, solved, call.gamma + (block + t) * M, call.dropped + block + t);
    }
  }
}

}  // namespace
}  // namespace pydeqsolve
