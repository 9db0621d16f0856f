// Pass 1 on CUDA: residuals, the new Gram row, the norms.
#pragma once
#include "cuda/sums.cuh"

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

// The rows that a batch of ages starts from: the newest two, and the one before the batch.
template <class Scalar>
struct Front {
  Pack<Scalar> R0, R1, R_newer, F0, F1, F_newer;
};

// Adds the dots of the first `ages` of a batch of kBatch older rows R, and with steps F. One part of a pack at a time,
// in a loop that is not unrolled: as doubles the whole would not fit in the registers.
template <int kBatch, bool kSteps, class Scalar>
__device__ inline void add_dots(const Front<Scalar>& front, const Pack<Scalar>* R, const Pack<Scalar>* F, int ages,
                                double* dots) {
  constexpr int kPart = Pack<Scalar>::kPart;
#pragma unroll 1
  for (int part = 0; part < Pack<Scalar>::kParts; ++part) {
    double r[kPart], y0[kPart], s0[kPart], newer[kPart], newer_z[kPart];
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      const double r1 = front.R1.value(part, k);
      r[k] = front.R0.value(part, k);
      y0[k] = r[k] - r1;
      newer[k] = front.R_newer.value(part, k);
      if constexpr (kSteps) {
        s0[k] = (double{front.F0.value(part, k)} - r[k]) - (double{front.F1.value(part, k)} - r1);
        newer_z[k] = double{front.F_newer.value(part, k)} - newer[k];
      }
    }
#pragma unroll
    for (int a = 0; a < kBatch; ++a) {
      if (a >= ages) continue;
      double* const sums = dots + Sums<kSteps>::kDots * a;
#pragma unroll
      for (int k = 0; k < kPart; ++k) {
        const double older = R[a].value(part, k), y = newer[k] - older;
        newer[k] = older;
        if constexpr (kSteps) {
          const double older_z = double{F[a].value(part, k)} - older, s = newer_z[k] - older_z;
          newer_z[k] = older_z;
          sums[0] = fma(s, y0[k], sums[0]);
          sums[1] = fma(s, r[k], sums[1]);
          sums[2] = fma(s0[k], y, sums[2]);
          sums[3] = fma(s0[k], s, sums[3]);
        } else {
          sums[0] = fma(y, y0[k], sums[0]);
          sums[1] = fma(y, r[k], sums[1]);
        }
      }
    }
  }
}

// Sums the dots of ages first … first + ages - 1 over this thread's packs. The group of the newest ages also writes the
// new rows and forms the norms. Rows come in batches of kBatch loads under way together, and no more: the registers
// they would take are those of a second thread block on the multiprocessor. Rows of 16 bits take some for conversion.
template <int kAges, bool kSteps, bool kVector, bool kNewest, class Scalar>
__device__ inline void accumulate(const Team& team, const Piece& piece, const Rows& rows, const History<Scalar>& h,
                                  RowTable table, const Scalar* f, const Scalar* z, Norm norm, int first, int ages,
                                  Partial<kAges, kSteps>& sums) {
  using Pack = Pack<Scalar>;
  constexpr int kBatch = Pack::kParts > 1 && kAges == 8 ? 2 : 4;
  const std::int64_t to_block = piece.block * rows.features;
  for_each_pack<Scalar>(team, piece, [&](std::int64_t at, int length) {
    const auto row = [&](const Scalar* base, int age) { return load<kVector>(base + table[age] + at, length); };
    const Pack z0 = load<kVector>(z + to_block + at, length);
    Front<Scalar> front;
    front.F0 = load<kVector>(f + to_block + at, length);
#pragma unroll
    for (int k = 0; k < Pack::kSize; ++k) {
      front.R0.set(k, kept<Scalar>(front.F0.value(k) - z0.value(k)));
    }
    front.R_newer = front.R0;
    front.F_newer = front.F0;
    if constexpr (!kNewest) {
      front.R1 = row(h.R, 1);
      front.R_newer = row(h.R, first);
      if constexpr (kSteps) {
        front.F1 = row(h.F, 1);
        front.F_newer = row(h.F, first);
      }
    }
#pragma unroll
    for (int batch = 0; batch < kAges; batch += kBatch) {
      if (batch >= ages) continue;
      Pack R[kBatch], F[kSteps ? kBatch : 1];
#pragma unroll
      for (int a = 0; a < kBatch; ++a) {
        if (batch + a >= ages) continue;
        R[a] = row(h.R, first + batch + a + 1);
        if constexpr (kSteps) F[a] = row(h.F, first + batch + a + 1);
      }
      if (kNewest && batch == 0) {
        front.R1 = R[0];
        if constexpr (kSteps) front.F1 = F[0];
      }
      add_dots<kBatch, kSteps>(front, R, F, ages - batch, sums.values + Sums<kSteps>::kDots * batch);
      front.R_newer = R[kBatch - 1];
      if constexpr (kSteps) front.F_newer = F[kBatch - 1];
    }
    if constexpr (kNewest) {  // after all loads, which the compiler may not move ahead of a store
      sums.add_squares(front.F0, z0, norm);
      store<kVector>(h.R + table[0] + at, length, front.R0);
      store<kVector>(h.F + table[0] + at, length, front.F0);
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
__global__ void __launch_bounds__(kThreads, kSteps || kAges > 8 || (kAges == 8 && !kVector) ? 1 : 2)
    measure_kernel(Rows rows, History<Scalar> h, Plan plan, const Scalar* f, const Scalar* z, double* norms, Norm norm,
                   double* partial) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(plan.team);
  if (team.piece < plan.pieces) {
    const Piece piece(rows, plan, h.sample_stride, team.piece);
    const bool wanted = !rows.wanted || rows.wanted[piece.block];
    const int shared_doubles = measure_shared_doubles<kAges, kSteps>(h.slots, team.size);
    double* const mine = shared + team.index * shared_doubles;
    const Sums<kSteps> sums{h.slots, mine};
    const int older = wanted ? older_rows(h.count[piece.at], h.slots) : 0, width = Sums<kSteps>::size(h.slots);
    fill_table(team, piece, h, h.slots, mine + shared_doubles - h.slots);
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
template <bool kSteps>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Rows rows, History<void> h, std::int64_t blocks, std::int64_t chunks, const double* partial,
                  double* norms, Norm norm) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  const Piece piece(rows, Plan{blocks, 1, rows.features, kThreads, false}, h.sample_stride, team.piece);
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
