// How a pass is cut into thread blocks, and launched. Nothing here allocates or waits, so what is launched can be
// captured in a graph.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "cuda/pieces.cuh"

namespace pydeqsolve {
namespace {

// Up to here a warp owns a block: a thousand blocks of 64 features fill the device with a thousand warps, and need no
// barrier wider than a warp.
constexpr std::int64_t kWarpFeatures = 1024;
// Beyond, a thread block owns a chunk of this many features, four packs of float per thread: 3 million features of one
// sample make 750 chunks, several for each multiprocessor, and the last wave of them is short.
constexpr std::int64_t kChunkFeatures = 4096;
constexpr int kSharedBytes = 48 * 1024;  // every device has as much without being asked

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::int64_t chunks_of(std::int64_t features) {
  return features <= kWarpFeatures ? 1 : divide_up(features, kChunkFeatures);
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % 16 == 0;
}

struct Shape {
  unsigned grid;
  unsigned threads;
  std::size_t shared;  // bytes
};

// As many teams per thread block as fit 256 threads, shared memory and the work at hand. A grid may have 2^31 - 1
// thread blocks, more than there are histories in any device's memory, so no thread has to loop over pieces; that would
// keep loop invariants in registers which the sums need.
inline Shape shape_of(std::int64_t pieces, int team, int shared_doubles) {
  const int bytes = shared_doubles * static_cast<int>(sizeof(double));
  std::int64_t teams = kThreads / team;
  if (teams * bytes > kSharedBytes) teams = bytes < kSharedBytes ? kSharedBytes / bytes : 1;
  if (teams > pieces) teams = pieces;
  return {static_cast<unsigned>(divide_up(pieces, teams)), static_cast<unsigned>(teams * team),
          static_cast<std::size_t>(teams * bytes)};
}

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace pydeqsolve
