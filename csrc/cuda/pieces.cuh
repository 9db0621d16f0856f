// How a CUDA grid divides the work: teams of threads, and the pieces of blocks that they own. The kernels are compiled
// by nvcc for a GPU and, the same text, by a host compiler for the emulator in tests/emulation, hence one launch macro,
// _sync intrinsics only, dynamic shared memory.
//
// Words used in all .cuh files: a block is a time block of a sample, as in step.h; a team is the set of threads that
// owns one piece, a chunk of a block: a warp where blocks are short, a whole thread block where they are long. How a
// block is cut and in which order its sums are formed depends on its number of features alone, so a sample's bits are
// the same alone, in any batch, and with or without 16-byte loads.
#pragma once
#include "core.h"

#ifndef PYDEQSOLVE_LAUNCH
#define PYDEQSOLVE_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#define PYDEQSOLVE_SHARED(name) extern __shared__ double name[]
#endif

namespace pydeqsolve {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a thread block
constexpr unsigned kAllLanes = 0xffffffffu;

// What one grid works through: n T blocks in `chunks` chunks each.
struct Plan {
  std::int64_t pieces;  // n T chunks
  std::int64_t chunks;  // per block
  std::int64_t length;  // of a chunk, a multiple of a pack
  int team;             // threads of a team: kWarp or kThreads
  bool vector;          // every row starts on 16 bytes
};

struct Team {
  int size;
  int rank;            // of this thread in its team
  int index;           // of the team in its thread block
  std::int64_t piece;  // that the team owns; the last thread block may have more teams than pieces are left

  __device__ explicit Team(int threads)
      : size(threads),
        rank(static_cast<int>(threadIdx.x) % threads),
        index(static_cast<int>(threadIdx.x) / threads),
        piece(std::int64_t{blockIdx.x} * (blockDim.x / threads) + index) {}
  __device__ void sync() const {
    if (size == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Where a piece lies.
struct Piece {
  std::int64_t block;       // of the n T at hand
  std::int64_t at;          // of the B T in the history
  std::int64_t row;         // offset of its slot 0 in R and F
  std::int64_t chunk;       // of the block
  std::int64_t begin, end;  // features

  __device__ Piece(const Call& call, const Plan& plan, std::int64_t piece) {
    const std::int64_t T = call.ring.blocks, D = call.ring.features;
    block = plan.chunks == 1 ? piece : piece / plan.chunks;
    const std::int64_t i = T == 1 ? block : block / T, t = block - i * T;
    const std::int64_t sample = call.rows ? call.rows[i] : i;
    at = sample * T + t;
    row = sample * call.ring.sample_stride + t * D;
    chunk = piece - block * plan.chunks;
    begin = chunk * plan.length;
    end = begin + plan.length < D ? begin + plan.length : D;
  }
};

}  // namespace
}  // namespace pydeqsolve
