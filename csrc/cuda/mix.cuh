// Pass 2 on CUDA: the next iterate.
#pragma once
#include "cuda/packs.cuh"
#include "cuda/weights.cuh"

namespace pydeqsolve {
namespace {

// z' of one piece: x = f - (1 - damping) r, less gamma_a times the differences of the same.
template <bool kDamped, bool kVector, class Scalar>
__device__ inline void mix_piece(const Team& team, const Piece& piece, const Call& call, RowTable table,
                                 std::uint8_t what, int newest, int differences, const double* gamma) {
  using Pack = Pack<Scalar>;
  constexpr int kSize = Pack::kSize, kBatch = kDamped ? 4 : 8;  // packs of f, and of r, under way at once
  const Scalar *const R = static_cast<const Scalar*>(call.ring.R), *const F = static_cast<const Scalar*>(call.ring.F);
  const Scalar* z_block = static_cast<const Scalar*>(call.z) + piece.block * call.ring.features;
  Scalar* out_block = static_cast<Scalar*>(call.z_next) + piece.block * call.ring.features;
  const double undamped = kDamped && what != kAccept ? 1 - call.ring.damping : 0;
  for_each_pack<Scalar>(team, piece, [&](std::int64_t at, int length) {
    const auto row = [&](const Scalar* base, int age) { return load<kVector>(base + table[age] + at, length); };
    Pack out;
    if (what == kKeep) {
      out = load<kVector>(z_block + at, length);
    } else {
      Pack newer_f = row(F, newest), newer_r = {};
      if (kDamped && undamped != 0) newer_r = row(R, newest);
      double x[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        x[k] = newer_f.value(k);
        if (kDamped && undamped != 0) x[k] = fma(-undamped, double{newer_r.value(k)}, x[k]);
      }
      for (int first = 0; first < differences; first += kBatch) {
        Pack older_f[kBatch], older_r[kDamped ? kBatch : 1];
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
          if (first + a >= differences) continue;
          older_f[a] = row(F, first + a + 1);
          if constexpr (kDamped) {
            if (undamped != 0) older_r[a] = row(R, first + a + 1);
          }
        }
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
          if (first + a >= differences) continue;
          const double weight = gamma[first + a];
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            if (weight != 0) x[k] = fma(-weight, double{newer_f.value(k)} - older_f[a].value(k), x[k]);
            if constexpr (kDamped) {
              if (undamped == 0) continue;
              if (weight != 0) x[k] = fma(weight * undamped, double{newer_r.value(k)} - older_r[a].value(k), x[k]);
            }
          }
          newer_f = older_f[a];
          if constexpr (kDamped) newer_r = older_r[a];
        }
      }
#pragma unroll
      for (int k = 0; k < kSize; ++k) out.set(k, static_cast<Scalar>(static_cast<Wide<Scalar>>(x[k])));
    }
    store<kVector>(out_block + at, length, out);
  });
}

__host__ __device__ inline int mix_shared_doubles(int slots, bool solve) {  // of one team
  return (solve ? system_doubles(slots - 1) : slots) + slots;
}

// Pass 2. A team owns a piece of the next iterate. With `solve` it first solves its block's small system itself, every
// chunk's team the same one: that costs less than a launch while systems are small. Without, gamma is given.
template <class Scalar, bool kDamped>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(Call call, Plan plan, bool solve) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(plan.team);
  const Ring& ring = call.ring;
  const int M = ring.slots;
  double* const work = shared + team.index * mix_shared_doubles(M, solve);
  if (team.piece < plan.pieces) {
    const Piece piece(call, plan, team.piece);
    const std::uint8_t what = call.mode[piece.block];
    const int differences = what == kMix ? larger(ring.count[piece.at] - 1, 0) : 0;
    const int newest = what == kReject && M > 1 ? 1 : 0;  // a ring of one row has no other to go back to
    double* const places = work + mix_shared_doubles(M, solve) - M;
    fill_table(team, piece, ring, M, places);
    const RowTable table = reinterpret_cast<RowTable>(places);
    Solved solved{work, 0};
    if (solve) {
      if (what == kMix) solved = solve_block(team, ring, piece.at, differences, nullptr, work);
      if (piece.chunk == 0)
        settle(team, ring, piece.at, what, differences, solved, call.gamma + piece.block * M,
               call.dropped + piece.block);
    } else {
      for (int a = team.rank; a < differences; a += team.size) work[a] = call.gamma[piece.block * M + a];
    }
    team.sync();
    if (plan.vector) {
      mix_piece<kDamped, true, Scalar>(team, piece, call, table, what, newest, differences, solved.gamma);
    } else {
      mix_piece<kDamped, false, Scalar>(team, piece, call, table, what, newest, differences, solved.gamma);
    }
  }
}

}  // namespace
}  // namespace pydeqsolve
