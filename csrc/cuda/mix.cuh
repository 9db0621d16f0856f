// Pass 2 on CUDA: the next iterate.
#pragma once
#include "cuda/packs.cuh"
#include "cuda/weights.cuh"

namespace pydeqsolve {
namespace {

// z' of one piece: x = f - (1 - beta) r, less gamma_a times the differences of the same.
template <bool kDamped, bool kVector, class Scalar>
__device__ inline void mix_piece(const Team& team, const Piece& piece, const Rows& rows, const Scalar* R,
                                 const Scalar* F, RowTable table, std::uint8_t what, int newest, int differences,
                                 const double* gamma, double beta, const Scalar* z, Scalar* z_next) {
  using Pack = Pack<Scalar>;
  constexpr int kSize = Pack::kSize, kBatch = kDamped ? 4 : 8;  // packs of f, and of r, under way at once
  const Scalar* z_block = z + piece.block * rows.features;
  Scalar* out_block = z_next + piece.block * rows.features;
  const double undamped = kDamped && what != kAccept ? 1 - beta : 0;
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
__global__ void __launch_bounds__(kThreads, 2)
    mix_kernel(Rows rows, History<Scalar> h, Plan plan, bool solve, double ridge, const std::uint8_t* mode,
               const double* given, double* gamma, std::int32_t* dropped, double beta, const Scalar* z,
               Scalar* z_next) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(plan.team);
  const int M = h.slots;
  double* const work = shared + team.index * mix_shared_doubles(M, solve);
  if (team.piece < plan.pieces) {
    const Piece piece(rows, plan, h.sample_stride, team.piece);
    const std::uint8_t what = mode[piece.block];
    const int differences = what == kMix ? larger(h.count[piece.at] - 1, 0) : 0;
    const int newest = what == kReject && M > 1 ? 1 : 0;  // a ring of one row has no other to go back to
    double* const places = work + mix_shared_doubles(M, solve) - M;
    fill_table(team, piece, h, M, places);
    const RowTable table = reinterpret_cast<RowTable>(places);
    Solved solved{work, 0};
    if (solve) {
      if (what == kMix) solved = solve_block(team, h, piece.at, differences, nullptr, ridge, work);
      if (piece.chunk == 0)
        settle(team, h, piece.at, what, differences, solved, gamma + piece.block * M, dropped + piece.block);
    } else {
      for (int a = team.rank; a < differences; a += team.size) work[a] = given[piece.block * M + a];
    }
    team.sync();
    if (plan.vector) {
      mix_piece<kDamped, true>(team, piece, rows, h.R, h.F, table, what, newest, differences, solved.gamma, beta, z,
                               z_next);
    } else {
      mix_piece<kDamped, false>(team, piece, rows, h.R, h.F, table, what, newest, differences, solved.gamma, beta, z,
                                z_next);
    }
  }
}

}  // namespace
}  // namespace pydeqsolve
