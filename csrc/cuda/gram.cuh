// Pass 1 on CUDA: residuals, the new Gram row, the norms.
#pragma once
#include "cuda/sums.cuh"

namespace pydeqsolve {
namespace {

// Moves the sums of one block into the history and the norms; a team does it together, after a barrier that follows
// its last reading of the count.
template <bool kSteps>
__device__ inline void finish_block(const Team& team, const Piece& piece, const Call& call, bool wanted, int older,
                                    const Sums<kSteps>& sums) {
  const Ring& ring = call.ring;
  const std::int64_t at = piece.at;
  const int M = ring.slots;
  double* const gram = ring.gram + at * M * M;
  for (int a = team.rank; a < older; a += team.size) {
    const int slot = slot_of(ring.head, a, M);
    gram[ring.head * M + slot] = sums.dot(a, kSteps ? 2 : 0);
    gram[slot * M + ring.head] = sums.dot(a, 0);
    ring.rhs[at * M + a] = sums.dot(a, 1);
    if (kSteps && ring.steps_gram) {
      double* const steps_gram = ring.steps_gram + at * M * M;
      steps_gram[ring.head * M + slot] = steps_gram[slot * M + ring.head] = sums.dot(a, 3);
    }
  }
  if (wanted && team.rank < 2) {
    const double squares = ring.squares[2 * at + team.rank] = sums.squares(team.rank);
    const bool finite = squares - squares == 0;
    call.norms[2 * piece.block + team.rank] =
        call.rule.norm != Norm::kMax || !finite ? squares : sums.largest(team.rank);
  }
  // A block that was not wanted starts anew: its rows would no longer be consecutive.
  if (team.rank == 0) ring.count[at] = wanted ? older + 1 : 0;
}

__device__ inline int older_rows(int count, int slots) { return count < slots - 1 ? count : slots - 1; }

// The rows that a batch of ages starts from: the newest two, and the one before the batch.
template <class Scalar>
struct Newest {
  Pack<Scalar> R0, R1, R_newer, F0, F1, F_newer;
};

// Adds the dots of the first `ages` of a batch of kBatch older rows R, and with steps F. One part of a pack at a time,
// in a loop that is not unrolled: as doubles the whole would not fit in the registers.
template <int kBatch, bool kSteps, class Scalar>
__device__ inline void add_dots(const Newest<Scalar>& newest, const Pack<Scalar>* R, const Pack<Scalar>* F, int ages,
                                double* dots) {
  constexpr int kPart = Pack<Scalar>::kPart;
#pragma unroll 1
  for (int part = 0; part < Pack<Scalar>::kParts; ++part) {
    double r[kPart], y0[kPart], s0[kPart], newer[kPart], newer_z[kPart];
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      const double r1 = newest.R1.value(part, k);
      r[k] = newest.R0.value(part, k);
      y0[k] = r[k] - r1;
      newer[k] = newest.R_newer.value(part, k);
      if constexpr (kSteps) {
        s0[k] = (double{newest.F0.value(part, k)} - r[k]) - (double{newest.F1.value(part, k)} - r1);
        newer_z[k] = double{newest.F_newer.value(part, k)} - newer[k];
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
__device__ inline void accumulate(const Team& team, const Piece& piece, const Call& call, RowTable table, int first,
                                  int ages, Partial<kAges, kSteps>& sums) {
  using Pack = Pack<Scalar>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200  // where four loads and the call would spill a register
  constexpr int kBatch = kAges == 8 ? 2 : 4;
#else
  constexpr int kBatch = Pack::kParts > 1 && kAges == 8 ? 2 : 4;
#endif
  Scalar *const of_R = static_cast<Scalar*>(call.ring.R), *const of_F = static_cast<Scalar*>(call.ring.F);
  const Scalar* const f = static_cast<const Scalar*>(call.f) + piece.block * call.ring.features;
  const Scalar* const z = static_cast<const Scalar*>(call.z) + piece.block * call.ring.features;
  for_each_pack<Scalar>(team, piece, [&](std::int64_t at, int length) {
    const auto row = [&](const Scalar* base, int age) { return load<kVector>(base + table[age] + at, length); };
    const Pack z0 = load<kVector>(z + at, length);
    Newest<Scalar> newest;
    newest.F0 = load<kVector>(f + at, length);
#pragma unroll
    for (int k = 0; k < Pack::kSize; ++k) {
      newest.R0.set(k, kept<Scalar>(newest.F0.value(k) - z0.value(k)));
    }
    newest.R_newer = newest.R0;
    newest.F_newer = newest.F0;
    if constexpr (!kNewest) {
      newest.R1 = row(of_R, 1);
      newest.R_newer = row(of_R, first);
      if constexpr (kSteps) {
        newest.F1 = row(of_F, 1);
        newest.F_newer = row(of_F, first);
      }
    }
#pragma unroll
    for (int batch = 0; batch < kAges; batch += kBatch) {
      if (batch >= ages) continue;
      Pack R[kBatch], F[kSteps ? kBatch : 1];
#pragma unroll
      for (int a = 0; a < kBatch; ++a) {
        if (batch + a >= ages) continue;
        R[a] = row(of_R, first + batch + a + 1);
        if constexpr (kSteps) F[a] = row(of_F, first + batch + a + 1);
      }
      if (kNewest && batch == 0) {
        newest.R1 = R[0];
        if constexpr (kSteps) newest.F1 = F[0];
      }
      add_dots<kBatch, kSteps>(newest, R, F, ages - batch, sums.values + Sums<kSteps>::kDots * batch);
      newest.R_newer = R[kBatch - 1];
      if constexpr (kSteps) newest.F_newer = F[kBatch - 1];
    }
    if constexpr (kNewest) {  // after all loads, which the compiler may not move ahead of a store
      sums.add_squares(newest.F0, z0, call.rule.norm);
      store<kVector>(of_R + table[0] + at, length, newest.R0);
      store<kVector>(of_F + table[0] + at, length, newest.F0);
    }
  });
}

template <int kAges, bool kSteps>
__host__ __device__ inline int measure_shared_doubles(int slots, int team) {  // of one team
  return Sums<kSteps>::size(slots) + Partial<kAges, kSteps>::kValues * (team / kWarp) + slots;
}

// Pass 1. A team owns a piece: r = f - z and f into the ring, and the piece's sums, which go to the history at once
// where a block is one piece, else to the workspace (n T, sums, chunks) for finish_kernel. The accumulators of kAges
// ages stay in registers; kMany takes older ages in further groups, which read the newest rows again, from cache.
template <class Scalar, int kAges, bool kMany, bool kSteps, bool kVector>
__global__ void __launch_bounds__(kThreads, kSteps || kAges > 8 || (kAges == 8 && !kVector) ? 1 : 2)
    measure_kernel(Call call, Plan plan) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(plan.team);
  if (team.piece < plan.pieces) {
    const Ring& ring = call.ring;
    const Piece piece(call, plan, team.piece);
    const bool wanted = !call.wanted || call.wanted[piece.block];
    const int shared_doubles = measure_shared_doubles<kAges, kSteps>(ring.slots, team.size);
    double* const mine = shared + team.index * shared_doubles;
    const Sums<kSteps> sums{ring.slots, mine};
    const int older = wanted ? older_rows(ring.count[piece.at], ring.slots) : 0, width = Sums<kSteps>::size(ring.slots);
    fill_table(team, piece, ring, ring.slots, mine + shared_doubles - ring.slots);
    const RowTable table = reinterpret_cast<RowTable>(mine + shared_doubles - ring.slots);
    team.sync();
    if (wanted) {
      Partial<kAges, kSteps> dots = {};
      accumulate<kAges, kSteps, kVector, true, Scalar>(team, piece, call, table, 0, older, dots);
      add_over_team(team, dots, call.rule.norm, 0, older, mine + width, sums);
    }
    if constexpr (kMany) {
#pragma unroll 1
      for (int first = kAges; first < older; first += kAges) {
        Partial<kAges, kSteps> dots = {};
        accumulate<kAges, kSteps, kVector, false, Scalar>(team, piece, call, table, first, older - first, dots);
        add_over_team(team, dots, call.rule.norm, first, older - first, mine + width, sums);
      }
    }
    if (plan.chunks == 1) {
      finish_block(team, piece, call, wanted, older, sums);
    } else if (wanted) {
      for (int v = team.rank; v < width; v += team.size) {
        if (sums.formed(v, older, call.rule.norm))
          call.workspace[(piece.block * width + v) * plan.chunks + piece.chunk] = mine[v];
      }
    }
  }
}

// The end of pass 1 for blocks of several chunks. A thread block owns a block, each warp every eighth of its sums.
template <bool kSteps>
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(Call call, std::int64_t blocks, std::int64_t chunks) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  const Ring& ring = call.ring;
  const Piece piece(call, Plan{blocks, 1, ring.features, kThreads, false}, team.piece);
  const Sums<kSteps> sums{ring.slots, shared};
  const int warp = team.rank / kWarp, lane = team.rank % kWarp, width = Sums<kSteps>::size(ring.slots);
  const bool wanted = !call.wanted || call.wanted[piece.block];
  const int older = wanted ? older_rows(ring.count[piece.at], ring.slots) : 0;
  for (int v = warp; wanted && v < width; v += kThreads / kWarp) {
    if (!sums.formed(v, older, call.rule.norm)) continue;
    const double* of_chunk = call.workspace + (piece.block * width + v) * chunks;
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
  finish_block(team, piece, call, wanted, older, sums);
}

}  // namespace
}  // namespace pydeqsolve
