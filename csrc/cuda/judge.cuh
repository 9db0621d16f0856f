// The judgement of samples on CUDA, and the iterates that it leaves behind.
#pragma once
#include "cuda/sums.cuh"
#include "judge.h"

namespace pydeqsolve {
namespace {

constexpr int kJudged = 3;  // doubles per sample: totals of r and of f, and whether any block dropped a difference

// A warp owns a sample, whose T blocks it adds up; judge_samples does the same on the host.
__global__ void __launch_bounds__(kThreads) judge_kernel(Call call) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kWarp);
  double* const totals = shared + team.index * kJudged;
  const std::int64_t T = call.ring.blocks;
  if (team.piece < call.n) {
    const std::int64_t first = team.piece * T;
    const bool is_max = call.rule.norm == Norm::kMax;
    double mine[kJudged] = {};
    for (std::int64_t t = first + team.rank; t < first + T; t += kWarp) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const double x = call.norms[2 * t + which];
        mine[which] = is_max ? worse(mine[which], x) : mine[which] + x;
      }
      mine[2] += call.dropped && call.dropped[t] > 0;
    }
    add_over_warp(mine, team.rank, totals);
    team.sync();
    if (is_max) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        mine[0] = worse(mine[0], __shfl_xor_sync(kAllLanes, mine[0], distance));
        mine[1] = worse(mine[1], __shfl_xor_sync(kAllLanes, mine[1], distance));
      }
    }
    if (team.rank == 0) {
      const double residual = is_max ? mine[0] : square_root(totals[0] / call.rule.divisor);
      const double size = is_max ? mine[1] : square_root(totals[1] / call.rule.divisor);
      totals[0] = judge(call.table[team.piece], residual, size, totals[2] > 0, call.rule);
    }
    team.sync();
    for (std::int64_t t = first + team.rank; t < first + T; t += kWarp) {
      call.mode[t] = static_cast<std::uint8_t>(totals[0]);
    }
  }
}

// Copies rows of `words` of the samples that were left behind: from[i] to to[rows[i]]. A thread block owns a
// chunk of one sample, and reads no more than its flag where there is nothing to copy.
template <class Word>
__global__ void __launch_bounds__(kThreads) keep_kernel(std::int64_t chunks, std::int64_t words, const Sample* table,
                                                        const std::int64_t* rows, const Word* from, Word* to) {
  const std::int64_t i = blockIdx.x / chunks, chunk = blockIdx.x % chunks, length = (words + chunks - 1) / chunks;
  if (table[i].left_behind == 0) return;
  const std::int64_t end = (chunk + 1) * length < words ? (chunk + 1) * length : words;
  for (std::int64_t w = chunk * length + threadIdx.x; w < end; w += kThreads) {
    to[rows[i] * words + w] = from[i * words + w];
  }
}

}  // namespace
}  // namespace pydeqsolve
