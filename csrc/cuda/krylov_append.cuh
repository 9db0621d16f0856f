// The orthogonalisation of a product on CUDA, and combinations of the vectors.
#pragma once
#include "cuda/krylov_sums.cuh"

namespace pydeqsolve {
namespace {

constexpr int kDots = 8;      // dot products whose sums a thread keeps at once
constexpr int kUnderWay = 4;  // packs of vectors whose loads are under way at once

// The entries of one piece of w, in the memory of the next vector, and the vectors q_0 ... q_k beside them. A thread
// always takes the same entries, so w needs no barrier.
template <class Scalar, bool kVector>
struct Rows {
  const Team& team;
  const KrylovCall& call;
  const Span& span;
  std::int64_t row;

  __device__ Rows(const Team& team, const KrylovCall& call, const Span& span)
      : team(team), call(call), span(span), row(span.sample * call.N) {}
  __device__ Scalar* w() const { return static_cast<Scalar*>(call.next) + row; }
  __device__ const Scalar* q(int j) const { return static_cast<const Scalar*>(call.vectors[j]) + row; }

  // w = q_k - A q_k.
  __device__ void start() const {
    const Scalar *const newest = q(call.k), *const product = static_cast<const Scalar*>(call.product) + row;
    for_each_pack<Scalar>(team, span, [&](std::int64_t at, int length) {
      const Pack<Scalar> a = load<kVector>(newest + at, length), b = load<kVector>(product + at, length);
      Pack<Scalar> out;
#pragma unroll
      for (int e = 0; e < Pack<Scalar>::kSize; ++e) out.set(e, a.value(e) - b.value(e));
      store<kVector>(w() + at, length, out);
    });
  }
  // q_j . w for all j, to h, shared.
  __device__ void dots(double* parts, double* h) const {
    const int vectors = call.k + 1;
#pragma unroll 1
    for (int first = 0; first < vectors; first += kDots) {
      double sums[kDots] = {};
      for_each_pack<Scalar>(team, span, [&](std::int64_t at, int length) {
        const Pack<Scalar> x = load<kVector>(w() + at, length);
#pragma unroll
        for (int batch = 0; batch < kDots; batch += kUnderWay) {
          if (first + batch >= vectors) continue;
          Pack<Scalar> rows[kUnderWay];
#pragma unroll
          for (int r = 0; r < kUnderWay; ++r) {
            if (first + batch + r < vectors) rows[r] = load<kVector>(q(first + batch + r) + at, length);
          }
#pragma unroll
          for (int r = 0; r < kUnderWay; ++r) {
            if (first + batch + r >= vectors) continue;
#pragma unroll
            for (int e = 0; e < Pack<Scalar>::kSize; ++e) {
              sums[batch + r] = fma(double{rows[r].value(e)}, double{x.value(e)}, sums[batch + r]);
            }
          }
        }
      });
      add_values(team, sums, vectors - first < kDots ? vectors - first : kDots, parts, h + first);
    }
  }
  // out = x + sign sum_j y_j q_j over `count` vectors, x null for zero; |out|^2 of this thread's entries.
  __device__ double add(int count, const double* y, double sign, const Scalar* x, Scalar* out) const {
    double squares = 0;
    for_each_pack<Scalar>(team, span, [&](std::int64_t at, int length) {
      Pack<Scalar> found = {};
      if (x) found = load<kVector>(x + at, length);
      double sums[Pack<Scalar>::kSize];
#pragma unroll
      for (int e = 0; e < Pack<Scalar>::kSize; ++e) sums[e] = found.value(e);
#pragma unroll 1
      for (int first = 0; first < count; first += kUnderWay) {
        Pack<Scalar> rows[kUnderWay];
#pragma unroll
        for (int r = 0; r < kUnderWay; ++r) {
          if (first + r < count) rows[r] = load<kVector>(q(first + r) + at, length);
        }
#pragma unroll
        for (int r = 0; r < kUnderWay; ++r) {
          if (first + r >= count) continue;
          const double weight = sign * y[first + r];
#pragma unroll
          for (int e = 0; e < Pack<Scalar>::kSize; ++e) sums[e] = fma(weight, double{rows[r].value(e)}, sums[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < Pack<Scalar>::kSize; ++e) {
        found.set(e, static_cast<Scalar>(sums[e]));
        const double rounded = found.value(e);
        squares = fma(rounded, rounded, squares);  // zeros beyond the end
      }
      store<kVector>(out + at, length, found);
    });
    return squares;
  }
  // w less its components h; |w|^2 of the piece to out, shared.
  __device__ void subtract(const double* h, double* parts, double* out) const {
    const double squares[1] = {add(call.k + 1, h, -1, w(), w())};
    add_values(team, squares, 1, parts, out);
  }
  __device__ void fill(Scalar value) const {
    Pack<Scalar> out;
#pragma unroll
    for (int e = 0; e < Pack<Scalar>::kSize; ++e) out.set(e, value);
    for_each_pack<Scalar>(team, span, [&](std::int64_t at, int length) { store<kVector>(w() + at, length, out); });
  }
  // The next vector: w over its length, or zero where the sample has ended its cycle.
  __device__ void finish(bool going, double below) const {
    if (!going) return fill(Scalar(0));
    const double inverse = 1 / below;
    for_each_pack<Scalar>(team, span, [&](std::int64_t at, int length) {
      const Pack<Scalar> x = load<kVector>(w() + at, length);
      Pack<Scalar> out;
#pragma unroll
      for (int e = 0; e < Pack<Scalar>::kSize; ++e) out.set(e, static_cast<Scalar>(x.value(e) * inverse));
      store<kVector>(w() + at, length, out);
    });
  }
};

// Shared workspace of a team, in doubles: h (k + 1), again (k + 1), two squares, rotations (2 k), sums of warps.
__host__ __device__ inline int append_doubles(int k, int team) {
  return 2 * (k + 1) + 2 + 2 * k + kDots * (team / kWarp);
}

// Column k of sample i from its components, in shared memory as `append_doubles` says; all threads of the team.
__device__ inline void take(const Team& team, const KrylovCall& call, std::int64_t i, double* shared) {
  const int k = call.k, vectors = k + 1;
  double* const rotations = shared + 2 * vectors + 2;
  for (int j = team.rank; j < k; j += team.size) {
    const double* const rotation = column_of(call.columns, i, j) + j + 1;
    rotations[2 * j] = rotation[0], rotations[2 * j + 1] = rotation[1];
  }
  team.sync();
  if (team.rank == 0) {
    const auto rotation = [&](int j) { return rotations + 2 * j; };
    take_components(call.samples[i], rotation, call.column + i * (k + 4), k, shared, shared + vectors,
                    shared[2 * vectors], shared[2 * vectors + 1], call.eps);
  }
  team.sync();
}

// Vectors and columns by their addresses, for the launches to come.
__device__ inline void name_next(const KrylovCall& call) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    call.vectors[call.k + 1] = call.next;
    call.columns[call.k] = call.column;
  }
}

// A whole `append` of samples of one chunk; a team owns one.
template <class Scalar, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) append_kernel(KrylovCall call, Plan plan) {
  PYDEQSOLVE_SHARED(memory);
  const Team team(plan.team);
  name_next(call);
  if (team.piece < plan.pieces) {
    const Span span(plan, call.N, team.piece);
    const int vectors = call.k + 1;
    double* const shared = memory + team.index * append_doubles(call.k, team.size);
    double *const again = shared + vectors, *const squares = again + vectors, *const parts = squares + 2 + 2 * call.k;
    const KrylovSample& sample = call.samples[span.sample];
    const Rows<Scalar, kVector> rows(team, call, span);
    if (sample.going) {
      rows.start();
      rows.dots(parts, shared);
      rows.subtract(shared, parts, squares);
      rows.dots(parts, again);
      if (!is_rounding(vectors, again, squares[0], call.eps)) rows.subtract(again, parts, squares + 1);
      take(team, call, span.sample, shared);
    }
    rows.finish(sample.going, sample.below);
  }
}

// The stages of `append` for long samples: a thread block owns a chunk, and leaves its sums in the workspace.
template <class Scalar, bool kVector, int kStage>
__global__ void __launch_bounds__(kThreads, 2) append_part_kernel(KrylovCall call, Plan plan) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  const Span span(plan, call.N, team.piece);
  const Workspace workspace(call);
  const int vectors = call.k + 1;
  double *const again = shared + vectors, *const squares = again + vectors, *const parts = squares + 2 + 2 * call.k;
  const double* const totals = workspace.totals(span.sample);
  const KrylovSample& sample = call.samples[span.sample];
  const Rows<Scalar, kVector> rows(team, call, span);
  if (kStage == 0) name_next(call);
  if (kStage == 3) rows.finish(sample.going, sample.below);
  if (kStage == 3 || !sample.going) return;
  const auto leave = [&](int value, double sum) {
    *(workspace.part(span.sample, value, plan.chunks) + span.chunk) = sum;
  };
  if (kStage == 0) {
    rows.start();
    rows.dots(parts, again);
  } else {
    const double* const h = kStage == 1 ? totals : totals + call.most;
    for (int j = team.rank; j < vectors; j += team.size) shared[j] = h[j];
    team.sync();
    if (kStage == 2 && is_rounding(vectors, shared, totals[2 * call.most], call.eps)) return;
    rows.subtract(shared, parts, squares);
    if (kStage == 1) rows.dots(parts, again);
  }
  for (int j = team.rank; kStage < 2 && j < vectors; j += team.size) leave(j, again[j]);
  if (kStage > 0 && team.rank == 0) leave(kStage == 1 ? vectors : 0, squares[0]);
}

// The sums of all chunks, and after the last stage the column; a thread block owns a sample.
template <int kStage>
__global__ void __launch_bounds__(kThreads, 2) append_total_kernel(KrylovCall call, std::int64_t chunks) {
  PYDEQSOLVE_SHARED(shared);
  const Team team(kThreads);
  const Workspace workspace(call);
  const std::int64_t i = team.piece, most = call.most;
  const int vectors = call.k + 1;
  double* const totals = workspace.totals(i);
  if (!call.samples[i].going) return;
  if (kStage == 0) add_chunks(team, workspace, i, chunks, vectors, false, totals);
  if (kStage == 1) {
    add_chunks(team, workspace, i, chunks, vectors + 1, false, shared);
    for (int j = team.rank; j < vectors; j += team.size) totals[most + j] = shared[j];
    if (team.rank == 0) totals[2 * most] = shared[vectors];
  }
  if (kStage == 2) {
    for (int j = team.rank; j < vectors; j += team.size) {
      shared[j] = totals[j], shared[vectors + j] = totals[most + j];
    }
    if (team.rank == 0) shared[2 * vectors] = totals[2 * most];
    team.sync();
    if (!is_rounding(vectors, shared + vectors, shared[2 * vectors], call.eps)) {
      add_chunks(team, workspace, i, chunks, 1, false, shared + 2 * vectors + 1);
    }
    take(team, call, i, shared);
  }
}

// The minimiser over the first `count` columns of sample i to y, shared; a warp does it. Returns its length.
__device__ inline double coordinates(const Team& team, const KrylovCall& call, std::int64_t i, int count, double* y) {
  for (int j = team.rank; j < count; j += team.size) y[j] = column_of(call.columns, i, j)[j + 3];
  team.sync();
#pragma unroll 1
  for (int j = count - 1; j >= 0; --j) {
    const double* const column = column_of(call.columns, i, j);
    const double found = y[j] / column[j];
    team.sync();
    for (int l = team.rank; l < j; l += team.size) y[l] -= found * column[l];
    if (team.rank == 0) y[j] = found;
    team.sync();
  }
  double squares = 0;
  for (int j = 0; j < count; ++j) squares += y[j] * y[j];
  team.sync();
  return square_root(squares);
}

// The coordinates of a combination, to the workspace; first, unless `cautious`, what `leave_out_weak` does.
__global__ void __launch_bounds__(kThreads, 2) coordinates_kernel(KrylovCall call) {
  PYDEQSOLVE_SHARED(memory);
  const Team team(kWarp);
  if (team.piece < call.B) {
    const std::int64_t i = team.piece;
    double *const y = memory + team.index * call.most, *const totals = Workspace(call).totals(i);
    KrylovSample& sample = call.samples[i];
    const int taken = sample.taken;
    int sound = sample.sound;
    if (!call.cautious) {
      const double most = sample.best / square_root(call.eps);
      while (sound > 0 && !(coordinates(team, call, i, sound, y) <= most)) --sound;
      if (team.rank == 0) sample.sound = sound;
    }
    const int count = call.cautious ? sound : taken;
    coordinates(team, call, i, count, y);
    for (int j = team.rank; j < count; j += team.size) totals[j] = y[j];
  }
}

// next = u + sum_j y_j q_j; a team owns a piece.
template <class Scalar, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) combine_kernel(KrylovCall call, Plan plan) {
  PYDEQSOLVE_SHARED(memory);
  const Team team(plan.team);
  if (team.piece < plan.pieces) {
    const Span span(plan, call.N, team.piece);
    const KrylovSample& sample = call.samples[span.sample];
    const int count = call.cautious ? sample.sound : sample.taken;
    double* const y = memory + team.index * call.most;
    const double* const totals = Workspace(call).totals(span.sample);
    for (int j = team.rank; j < count; j += team.size) y[j] = totals[j];
    team.sync();
    const Rows<Scalar, kVector> rows(team, call, span);
    const Scalar* const u = call.u ? static_cast<const Scalar*>(call.u) + rows.row : nullptr;
    if (sample.broken) {
      rows.fill(static_cast<Scalar>(NAN));
    } else {
      rows.add(count, y, 1, u, rows.w());
    }
  }
}

}  // namespace
}  // namespace pydeqsolve
