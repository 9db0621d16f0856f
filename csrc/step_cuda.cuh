// The kernels of the CUDA step; step_cuda.cu launches them. The same text is compiled by nvcc for a GPU and by a host
// compiler for the emulator in tests/emulation, hence one launch macro, _sync intrinsics only, dynamic shared memory.
//
// Words used here: a block is a time block of a sample, as in step.h; a team is the set of threads that owns one piece,
// a chunk of a block: a warp where blocks are short, a whole thread block where they are long. How a block is cut and
// in which order its sums are formed depends on its number of features alone, so a sample's bits are the same alone,
// in any batch, and with or without 16-byte loads.
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
constexpr int kThreads = 256;      // of a thread block
constexpr int kSumThreads = 1024;  // of a thread block that sums over time
constexpr int kSumSegments = kSumThreads / kWarp;
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

  __device__ Piece(const Rows& rows, const Plan& plan, int slots, std::int64_t piece) {
    const std::int64_t T = rows.blocks, D = rows.features;
    block = plan.chunks == 1 ? piece : piece / plan.chunks;
    const std::int64_t i = T == 1 ? block : block / T, t = block - i * T;
    const std::int64_t sample = rows.rows ? rows.rows[i] : i;
    at = sample * T + t;
    row = (sample * slots * T + t) * D;
    chunk = piece - block * plan.chunks;
    begin = chunk * plan.length;
    end = begin + plan.length < D ? begin + plan.length : D;
  }
};

// 16 bytes of consecutive features: what one thread takes at a time.
template <class Scalar>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(Scalar));
  Scalar v[kSize];
};

// The `length` features from p on, zeros after them: those change no sum. One load where rows are aligned.
template <bool kVector, class Scalar>
__device__ inline Pack<Scalar> load(const Scalar* p, int length) {
  Pack<Scalar> pack;
  if constexpr (kVector) {
    pack = *reinterpret_cast<const Pack<Scalar>*>(p);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) pack.v[k] = k < length ? p[k] : Scalar(0);
  }
  return pack;
}

template <bool kVector, class Scalar>
__device__ inline void store(Scalar* p, int length, const Pack<Scalar>& pack) {
  if constexpr (kVector) {
    *reinterpret_cast<Pack<Scalar>*>(p) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) {
      if (k < length) p[k] = pack.v[k];
    }
  }
}

// Calls body(at, length) for every pack of the piece that is this thread's.
template <class Scalar, class Body>
__device__ inline void for_each_pack(const Team& team, const Piece& piece, const Body& body) {
  constexpr int kSize = Pack<Scalar>::kSize;
  for (std::int64_t at = piece.begin + team.rank * kSize; at < piece.end; at += team.size * kSize) {
    body(at, piece.end - at < kSize ? static_cast<int>(piece.end - at) : kSize);
  }
}

// Where the row of each age starts in R and F, for one block: a table in shared memory that is read anew for every
// pack, hence volatile. Kept in registers, as the compiler would, sixteen addresses cost a thread block's worth of
// them.
using RowTable = const volatile std::int64_t*;

template <class Scalar>
__device__ inline void fill_table(const Team& team, const Piece& piece, const Rows& rows, const History<Scalar>& h,
                                  int ages, double* table) {
  for (int a = team.rank; a < ages; a += team.size) {
    reinterpret_cast<std::int64_t*>(table)[a] = piece.row + slot_of(h.head, a, h.slots) * rows.blocks * rows.features;
  }
}

// Adds every entry of `values` over the lanes of a warp by recursive halving: a lane hands half of its values to its
// partner and adds the partner's other half, so K values take about K exchanges, not 5 K. What a lane ends up with
// goes to out[first], out[first + 1], …, `count` of them.
template <int kValues, int kDistance = kWarp / 2>
__device__ inline void add_over_warp(const double (&values)[kValues], int lane, double* out, int first = 0,
                                     int count = kValues) {
  constexpr int kHalf = (kValues + 1) / 2;
  const bool upper = (lane & kDistance) != 0;
  double sums[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double low = values[i], high = i + kHalf < kValues ? values[i + kHalf < kValues ? i + kHalf : 0] : 0;
    sums[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kDistance);
  }
  first += upper ? kHalf : 0;
  count = upper ? count - kHalf : count < kHalf ? count : kHalf;
  if constexpr (kDistance > 1) {
    add_over_warp<kHalf, kDistance / 2>(sums, lane, out, first, count);
  } else {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      if (i < count) out[first + i] = sums[i];
    }
  }
}

__device__ inline double larger(double a, double b) { return a > b ? a : b; }

__device__ inline double max_over_warp(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sums of one block or piece: `dots` for each age, then the squares of r and f, then their largest entries.
// dots: w_a . y_0 and w_a . r_0; with steps also s_0 . y_a and s_0 . s_a.
template <bool kSteps>
struct Sums {
  static constexpr int kDots = kSteps ? 4 : 2;
  int slots;
  double* row;

  __host__ __device__ static int size(int slots) { return kDots * slots + 4; }
  __device__ double& dot(int age, int which) const { return row[kDots * age + which]; }
  __device__ double& squares(int which) const { return row[kDots * slots + which]; }
  __device__ double& largest(int which) const { return row[kDots * slots + 2 + which]; }
  __device__ bool is_largest(int v) const { return v >= kDots * slots + 2; }
  __device__ bool formed(int v, int older, Norm norm) const {  // else entry v of row has no value
    return v < kDots * older || (v >= kDots * slots && (norm == Norm::kMax || !is_largest(v)));
  }
};

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

// What a thread has summed over its packs: the dots of kAges ages, then the squares of r and f.
template <int kAges, bool kSteps>
struct Partial {
  static constexpr int kDots = Sums<kSteps>::kDots;
  static constexpr int kValues = kDots * kAges + 2;
  double values[kValues];
  double largest[2];

  template <class Scalar>
  __device__ void add_squares(const Pack<Scalar>& r, const Pack<Scalar>& f, Norm norm) {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) {
      const double of_r = r.v[k], of_f = f.v[k];
      values[kDots * kAges] = fma(of_r, of_r, values[kDots * kAges]);
      values[kDots * kAges + 1] = fma(of_f, of_f, values[kDots * kAges + 1]);
      if (norm == Norm::kMax) {
        largest[0] = larger(largest[0], magnitude(of_r));
        largest[1] = larger(largest[1], magnitude(of_f));
      }
    }
  }
};

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

// Adds the partial sums of a team's threads into `sums`. parts is shared workspace of kValues doubles per warp.
template <int kAges, bool kSteps>
__device__ inline void add_over_team(const Team& team, const Partial<kAges, kSteps>& mine, Norm norm, int first,
                                     int ages, double* parts, const Sums<kSteps>& sums) {
  using Mine = Partial<kAges, kSteps>;
  const int warps = team.size / kWarp, warp = team.rank / kWarp, lane = team.rank % kWarp;
  add_over_warp(mine.values, lane, parts + warp * Mine::kValues);
  team.sync();
  for (int v = team.rank; v < Mine::kValues; v += team.size) {
    double sum = parts[v];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) sum += parts[w * Mine::kValues + v];
    const int age = v / Mine::kDots, square = v - Mine::kDots * kAges;
    if (age < ages && square < 0) sums.dot(first + age, v % Mine::kDots) = sum;
    if (square >= 0 && first == 0) sums.squares(square) = sum;
  }
  team.sync();
  if (first == 0 && norm == Norm::kMax) {
    const double of_r = max_over_warp(mine.largest[0]), of_f = max_over_warp(mine.largest[1]);
    if (lane < 2) parts[2 * warp + lane] = lane == 0 ? of_r : of_f;
    team.sync();
    if (team.rank < 2) {
      double most = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) most = larger(most, parts[2 * w + team.rank]);
      sums.largest(team.rank) = most;
    }
    team.sync();
  }
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

__host__ __device__ inline int summed_doubles(int m) { return m * m + m + 2; }

// Sums the small systems over time. A thread block owns 32 entries of one sample's systems, a warp a segment of time,
// a lane one entry. systems (n, T, E) holds prefix sums for a causal coupling, (n, E) totals for a joint one, where
// E = m² + m + 2: A by rows, b, the squares of r and f. Reads the counts of mixing blocks only.
template <class Scalar>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(Rows rows, History<Scalar> h, bool prefix, const std::uint8_t* mode, double* systems) {
  PYDEQSOLVE_SHARED(totals);  // (segments, 32)
  const int m = h.slots - 1, entries = summed_doubles(m), groups = (entries + kWarp - 1) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t T = rows.blocks, segment = (T + kSumSegments - 1) / kSumSegments;
  const std::int64_t begin = warp * segment < T ? warp * segment : T, end = begin + segment < T ? begin + segment : T;
  const std::int64_t i = blockIdx.x / groups, sample = rows.rows ? rows.rows[i] : i;
  const int entry = static_cast<int>(blockIdx.x % groups) * kWarp + lane;
  const bool in_rhs = entry >= m * m, inside = entry < entries;
  const int square = entry - m * m - m;  // which of the two, or negative
  const int row = in_rhs ? entry - m * m : entry / m, column = in_rhs ? 0 : entry % m;
  const auto term = [&](std::int64_t t) {
    const std::int64_t at = sample * T + t;
    if (!inside || mode[i * T + t] != kMix) return 0.0;
    if (square >= 0) return h.squares[2 * at + square];
    const int differences = h.count[at] - 1;
    if (row >= differences || column >= differences) return 0.0;
    if (in_rhs) return h.rhs[at * h.slots + row];
    const std::int64_t gram = at * h.slots * h.slots;
    return system_entry(h.kind, row, column, h.head, h.slots, h.gram + gram,
                        h.steps_gram ? h.steps_gram + gram : nullptr);
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

// Shared workspace of one small system, in doubles: A, b, scale, order and what was dropped.
__host__ __device__ inline int system_doubles(int m) { return m * m + 2 * m + (m + 2) / 2; }

struct Solved {
  const double* gamma;  // by age, shared
  int dropped;
};

// Solves the system of `size` differences of one block in `work`; all threads of the team take part. `summed` is its
// A (m, m) and b (m,), or null for the block's own Gram.
template <class Scalar>
__device__ inline Solved solve_block(const Team& team, const History<Scalar>& h, std::int64_t at, int size,
                                     const double* summed, double ridge, double* work) {
  const int M = h.slots, m = M - 1;
  double *const A = work, *const b = A + m * m, *const scale = b + m;
  int* const order = reinterpret_cast<int*>(scale + m);
  const double *const gram = h.gram + at * M * M, *const steps_gram =
                                                      h.steps_gram ? h.steps_gram + at * M * M : nullptr;
  for (int e = team.rank; e < size * size; e += team.size) {
    const int i = e / size, j = e % size;
    A[e] = summed ? summed[i * m + j] : system_entry(h.kind, i, j, h.head, M, gram, steps_gram);
  }
  for (int i = team.rank; i < size; i += team.size) b[i] = summed ? summed[m * m + i] : h.rhs[at * M + i];
  team.sync();
  if (team.rank == 0) {
    const double* const squares = summed ? summed + m * m + m : h.squares + 2 * at;
    order[m] = solve_system(h.kind, size, A, b, scale, order, ridge, squares, h.eps);
  }
  team.sync();
  return {b, order[m]};
}

// Writes what the solve leaves behind for one block. Only blocks that do not mix have their count changed, and only
// counts of blocks that mix are read, so the order of teams does not matter.
template <class Scalar>
__device__ inline void settle(const Team& team, const History<Scalar>& h, std::int64_t at, std::uint8_t what, int size,
                              const Solved& solved, double* gamma, std::int32_t* dropped) {
  if (what == kMix) {
    for (int a = team.rank; a < h.slots; a += team.size) gamma[a] = a < size ? solved.gamma[a] : 0;
  }
  if (team.rank == 0) {
    *dropped = what == kMix ? solved.dropped : 0;
    if (what == kReject) h.count[at] = 0;
    if (what == kPlain) h.count[at] = 1;
  }
}

// The small systems on their own. A warp owns one: a block's, or with `totals` (n, E) one for all blocks of a sample.
// systems (n, T, E) are the causal sums; both null: every block's own Gram.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    weights_kernel(Rows rows, History<Scalar> h, const double* systems, const double* totals, double ridge,
                   const std::uint8_t* mode, double* gamma, std::int32_t* dropped) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kWarp);
  const int M = h.slots, m = M - 1, entries = summed_doubles(m);
  double* const work = shared + team.index * system_doubles(m);
  const std::int64_t T = rows.blocks, span = totals ? T : 1;
  const std::int64_t block = team.piece * span;
  if (block < rows.n * T) {
    const std::int64_t i = block / T, sample = rows.rows ? rows.rows[i] : i, at = sample * T + block - i * T;
    double most = 0;
    for (std::int64_t t = team.rank; t < span; t += kWarp) {
      if (mode[block + t] == kMix) most = larger(most, h.count[at + t] - 1);
    }
    const int size = static_cast<int>(max_over_warp(most));
    const double* summed = totals ? totals + i * entries : systems ? systems + block * entries : nullptr;
    const Solved solved = solve_block(team, h, at, size, summed, ridge, work);
    for (std::int64_t t = 0; t < span; ++t) {
      settle(team, h, at + t, mode[block + t], size, solved, gamma + (block + t) * M, dropped + block + t);
    }
  }
}

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
      const Pack f0 = row(F, newest);
      Pack r0 = {};
      if (kDamped && undamped != 0) r0 = row(R, newest);
      double x[kSize], f[kSize], r[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        f[k] = x[k] = f0.v[k];
        r[k] = r0.v[k];
        if (kDamped && undamped != 0) x[k] = fma(-undamped, r[k], x[k]);
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
            const double older = older_f[a].v[k];
            if (weight != 0) x[k] = fma(-weight, f[k] - older, x[k]);
            f[k] = older;
            if constexpr (kDamped) {
              if (undamped == 0) continue;
              const double past_r = older_r[a].v[k];
              if (weight != 0) x[k] = fma(weight * undamped, r[k] - past_r, x[k]);
              r[k] = past_r;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kSize; ++k) out.v[k] = static_cast<Scalar>(x[k]);
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
    const Piece piece(rows, plan, M, team.piece);
    const std::uint8_t what = mode[piece.block];
    const int differences = what == kMix ? larger(h.count[piece.at] - 1, 0) : 0;
    const int newest = what == kReject && M > 1 ? 1 : 0;  // a ring of one row has no other to go back to
    double* const places = work + mix_shared_doubles(M, solve) - M;
    fill_table(team, piece, rows, h, M, places);
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
