// Pass 1 on CUDA: residuals, the new Gram row, the norms.
#pragma once
#include "sums.cuh"

namespace pydeqsolve {
namespace {

// Moves the sums of one block into the history and the norms; a team does it together, after a barrier that follows
// its last reading of the count.
template <bool kSteps, class Scalar>
__device__ inline void finish_block(const Team& team, const History<Scalar>& h, std::int64_t at, bool wanted, int older,
                                    const Sums<kSteps>& sums, Norm norm, double* norms) {
  const int M = h.slots;
  double* const gram = h.gram + at * M * M;
  for (int a = team.rank; a < older; a += team.size) {
    const int slot = slot_of(h.head, a, M);
    gram[h.head * M + slot] = sums.dot(a, kSteps ? 2 : 0);
    gram[slot * M + h.head] = sums.dot(a, 0);
    h.rhs[at * M + a] = sums.dot(a, 1);
    if (kSteps && h.steps_gram) {
      double* const steps_gram = h.steps_gram + at * M * M;
      steps_gram[h.head * M + slot] = steps_gram[slot * M + h.head] = sums.dot(a, 3);
    }
  }
  if (wanted && team.rank < 2) {
    const double squares = h.squares[2 * at + team.rank] = sums.squares(team.rank);
    const bool finite = squares - squares == 0;
    norms[team.rank] = norm == Norm::kSquares || !finite ? squares : sums.largest(team.rank);
  }
  // A block that was not wanted starts anew: its rows would no longer be consecutive.
  if (team.rank == 0) h.count[at] = wanted ? older + 1 : 0;
}

__device__ inline int older_rows(int count, int slots) { return count < slots - 1 ? count : slots - 1; }

// Sums the dots of ages first … first + ages - 1 over this thread's packs. The group of the newest ages also writes the
// new rows and forms the norms. Rows come in batches of kBatch loads under way together, and no more: the registers
// they would take are those of a second thread block on the multiprocessor.
template <int kAges, bool kSteps, bool kVector, bool kNewest, class Scalar>
__device__ inline void accumulate(const Team& team, const Piece& piece, const Rows& rows, const History<Scalar>& h,
                                  RowTable table, const Scalar* f, const Scalar* z, Norm norm, int first, int ages,
                                  Partial<kAges, kSteps>& sums) {
  using Pack = Pack<Scalar>;
  constexpr int kSize = Pack::kSize, kDots = Sums<kSteps>::kDots, kBatch = 4;
  const std::int64_t to_block = piece.block * rows.features;
  for_each_pack<Scalar>(team, piece, [&](std::int64_t at, int length) {
    const auto offset = [&](int age) { return table[age] + at; };
    const Pack f0 = load<kVector>(f + to_block + at, length), z0 = load<kVector>(z + to_block + at, length);
    double r[kSize], y0[kSize], s0[kSize], newer[kSize], newer_z[kSize];
    Pack r0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      r0.v[k] = f0.v[k] - z0.v[k];
      newer[k] = r[k] = r0.v[k];
      newer_z[k] = z0.v[k];
    }
    if constexpr (!kNewest) {
      const Pack R1 = load<kVector>(h.R + offset(1), length), R_newer = load<kVector>(h.R + offset(first), length);
      Pack F1, F_newer;
      if constexpr (kSteps) {
        F1 = load<kVector>(h.F + offset(1), length);
        F_newer = load<kVector>(h.F + offset(first), length);
      }
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const double r1 = R1.v[k];
        y0[k] = r[k] - r1;
        newer[k] = R_newer.v[k];
        if constexpr (kSteps) {
          s0[k] = newer_z[k] - (static_cast<double>(F1.v[k]) - r1);
          newer_z[k] = static_cast<double>(F_newer.v[k]) - newer[k];
        }
      }
    }
#pragma unroll
    for (int batch = 0; batch < kAges; batch += kBatch) {
      if (batch >= ages) continue;
      Pack R[kBatch], F[kSteps ? kBatch : 1];
#pragma unroll
      for (int a = 0; a < kBatch; ++a) {
        if (batch + a >= ages) continue;
        R[a] = load<kVector>(h.R + offset(first + batch + a + 1), length);
        if constexpr (kSteps) F[a] = load<kVector>(h.F + offset(first + batch + a + 1), length);
      }
#pragma unroll
      for (int a = 0; a < kBatch; ++a) {
        if (batch + a >= ages) continue;
        double* dots = sums.values + kDots * (batch + a);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const double older = R[a].v[k], y = newer[k] - older;
          newer[k] = older;
          if (kNewest && batch + a == 0) y0[k] = y;
          if constexpr (kSteps) {
            const double older_z = static_cast<double>(F[a].v[k]) - older, s = newer_z[k] - older_z;
            newer_z[k] = older_z;
            if (kNewest && batch + a == 0) s0[k] = s;
            dots[0] = fma(s, y0[k], dots[0]);
            dots[1] = fma(s, r[k], dots[1]);
            dots[2] = fma(s0[k], y, dots[2]);
            dots[3] = fma(s0[k], s, dots[3]);
          } else {
            dots[0] = fma(y, y0[k], dots[0]);
            dots[1] = fma(y, r[k], dots[1]);
          }
        }
      }
    }
    if constexpr (kNewest) {  // after all loads, which the compiler may not move ahead of a store
      sums.add_squares(r0, f0, norm);
      store<kVector>(h.R + offset(0), length, r0);
      store<kVector>(h.F + offset(0), length, f0);
    }
  });
}

template <int kAges, bool kSteps>
__host__ __device__ inline int measure_shared_doubles(int slots, int team) {  // of one team
  return Sums<kSteps>::size(slots) + Partial<kAges, kSteps>::kValues * (team / kWarp) + slots;
}

// Pass 1. A team owns a piece: r = f - z and f into the ring, and the piece's sums, which go to the history at once
// where a block is one piece, else to `partial` (n T, sums, chunks) for finish_kernel. The accumulators of kAges ages
// stay in registers; kMany takes older ages in further groups, which read the newest rows again, from cache.
template <class Scalar, int kAges, bool kMany, bool kSteps, bool kVector>
__global__ void __launch_bounds__(kThreads, kSteps || kAges > 8 ? 1 : 2)
    measure_kernel(Rows rows, History<Scalar> h, Plan plan, const Scalar* f, const Scalar* z, double* norms, Norm norm,
                   double* partial) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(plan.team);
  if (team.piece < plan.pieces) {
    const Piece piece(rows, plan, h.slots, team.piece);
    const bool wanted = !rows.wanted || rows.wanted[piece.block];
    const int shared_doubles = measure_shared_doubles<kAges, kSteps>(h.slots, team.size);
    double* const mine = shared + team.index * shared_doubles;
    const Sums<kSteps> sums{h.slots, mine};
    const int older = wanted ? older_rows(h.count[piece.at], h.slots) : 0, width = Sums<kSteps>::size(h.slots);
    fill_table(team, piece, rows, h, h.slots, mine + shared_doubles - h.slots);
    const RowTable table = reinterpret_cast<RowTable>(mine + shared_doubles - h.slots);
    team.sync();
    if (wanted) {
      Partial<kAges, kSteps> dots = {};
      accumulate<kAges, kSteps, kVector, true>(team, piece, rows, h, table, f, z, norm, 0, older, dots);
      add_over_team(team, dots, norm, 0, older, mine + width, sums);
    }
    if constexpr (kMany) {
#pragma unroll 1
      for (int first = kAges; first < older; first += kAges) {
        Partial<kAges, kSteps> dots = {};
        accumulate<kAges, kSteps, kVector, false>(team, piece, rows, h, table, f, z, norm, first, older - first, dots);
        add_over_team(team, dots, norm, first, older - first, mine + width, sums);
      }
    }
    if (plan.chunks == 1) {
      finish_block(team, h, piece.at, wanted, older, sums, norm, norms + 2 * piece.block);
    } else if (wanted) {
      for (int v = team.rank; v < width; v += team.size) {
        if (sums.formed(v, older, norm)) partial[(piece.block * width + v) * plan.chunks + piece.chunk] = mine[v];
      }
    }
  }
}

// The end of pass 1 for blocks of several chunks. A thread block owns a block, each warp every eighth of its sums.
template <class Scalar, bool kSteps>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Rows rows, History<Scalar> h, std::int64_t blocks, std::int64_t chunks, const double* partial,
                  double* norms, Norm norm) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  const Piece piece(rows, Plan{blocks, 1, rows.features, kThreads, false}, h.slots, team.piece);
  const Sums<kSteps> sums{h.slots, shared};
  const int warp = team.rank / kWarp, lane = team.rank % kWarp, width = Sums<kSteps>::size(h.slots);
  const bool wanted = !rows.wanted || rows.wanted[piece.block];
  const int older = wanted ? older_rows(h.count[piece.at], h.slots) : 0;
  for (int v = warp; wanted && v < width; v += kThreads / kWarp) {
    if (!sums.formed(v, older, norm)) continue;
    const double* of_chunk = partial + (piece.block * width + v) * chunks;
    double sum[1] = {0};
    if (sums.is_largest(v)) {
      for (std::int64_t c = lane; c < chunks; c += kWarp) sum[0] = larger(sum[0], of_chunk[c]);
      const double most = max_over_warp(sum[0]);
      if (lane == 0) shared[v] = most;
    } else {
      for (std::int64_t c = lane; c < chunks; c += kWarp) sum[0] += of_chunk[c];
      add_over_warp(sum, lane, shared + v);
    }
  }
  team.sync();
  finish_block(team, h, piece.at, wanted, older, sums, norm, norms + 2 * piece.block);
}

}  // namespace
}  // namespace pydeqsolve
