// The small systems of kLanes samples of a few unknowns, from their rows.
// Included by few_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>

#include "core.h"
#include "cpu/few_rows.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

template <class Scalar, int N, bool full>
class FewSystems {
 public:
  explicit FewSystems(const Ring& r) : ring(r) {}

  // The weights gamma by age of `size` differences in each lane, as
  // `solve_system` of core.h finds them, and whether differences were left out.
  // Returns how many of gamma there are: the rest are zero.
  int solve(const FewRows<Scalar, N, full>& rows, const Measured<Scalar, N>& m, const Longs& size, Lanes* gamma,
            Longs& lost) {
    lost = Longs{};
    if (!any(size > 0)) return 0;
    int used =
        ring.kind == Kind::kAndersonII && ring.ridge == 0 ? solve_positive<N>(rows, m, size, gamma, lost) : N + 1;
    if (used > N) {
      used = ring.kind == Kind::kAndersonII ? solve_positive<kMost>(rows, m, size, gamma, lost)
                                            : solve_general_each(rows, m, size, gamma, lost);
    }
    int last = used;
    while (last > 0 && !any(gamma[last - 1] != Lanes{})) --last;
    return last;
  }

 private:
  static constexpr int kMost = kFewSlots - 1;

  // `solve_positive` of core.h row by row: row j needs y_0 ... y_j alone, and
  // the rows after the N-th independent one are not made. A ridge makes all of
  // them independent. Returns how many of `Most` rows were made, or Most + 1
  // where that was not enough.
  template <int Most>
  int solve_positive(const FewRows<Scalar, N, full>& rows, const Measured<Scalar, N>& m, const Longs& size,
                     Lanes* gamma, Longs& lost) const {
    const Lanes zero{};
    const LanesRoot root;
    Lanes newer[N], y[Most][N], A[Most][Most], b[Most], scale[Most] = {};
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) newer[e] = m.r[e];
    Longs rank{}, wanted{};
    int made = 0;
#pragma GCC unroll 4
    for (int j = 0; j < Most; ++j) {
      const Longs there = size > j;
      wanted = ring.ridge > 0 ? there : there & (rank < N);
      if (!any(wanted)) break;
      made = j + 1;
      Lanes next[N];
      rows.residual(j + 1, next);
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        y[j][e] = there ? newer[e] - next[e] : zero;
        newer[e] = next[e];
      }
      Lanes* const L = A[j];
      const Lanes square = dot<N>(y[j], y[j]);
      scale[j] = square > zero ? 1.0 / root(square) : zero;
      b[j] = dot<N>(y[j], m.r) * scale[j];
#pragma GCC unroll 4
      for (int k = 0; k <= j; ++k) {
        const Lanes factor = scale[j] * scale[k];
        L[k] = factor > zero ? dot<N>(y[j], y[k]) * factor : zero;  // 0 times infinity is NaN
      }
      Lanes pivot = L[j] + ring.ridge;
#pragma GCC unroll 4
      for (int k = 0; k < j; ++k) {
        Lanes sum = L[k];
#pragma GCC unroll 4
        for (int i = 0; i < k; ++i) sum -= L[i] * A[k][i];
        L[k] = sum * A[k][k];
        pivot -= L[k] * L[k];
      }
      const Longs kept = wanted & (scale[j] > zero) & (pivot > zero + kPivotCutoff);  // false for NaN too
      L[j] = kept ? 1.0 / root(pivot) : zero;
      Lanes sum = kept ? b[j] : zero;
#pragma GCC unroll 4
      for (int k = 0; k < j; ++k) {
        L[k] = kept ? L[k] : zero;
        sum -= L[k] * b[k];
      }
      b[j] = sum * L[j];
      rank -= kept;  // a mask is -1
    }
    if (made == Most && any((size > Most) & (rank < N))) return Most + 1;
#pragma GCC unroll 4
    for (int i = Most - 1; i >= 0; --i) {
      if (i >= made) continue;
      Lanes sum = b[i];
#pragma GCC unroll 4
      for (int k = i + 1; k < Most; ++k) {
        if (k < made) sum -= A[k][i] * b[k];
      }
      b[i] = sum * A[i][i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < Most; ++i) {
      if (i < made) b[i] *= scale[i];
    }
    const Longs sound = is_sound(made, b, m.rr, m.ff, ring.eps);
#pragma GCC unroll 4
    for (int i = 0; i < Most; ++i) {
      if (i < made) gamma[i] = sound ? b[i] : zero;
    }
    lost = (size > 0) & (~sound | (size > rank));
    return made;
  }

  // The matrices that are not symmetric: formed in all lanes, solved one after
  // the other.
  int solve_general_each(const FewRows<Scalar, N, full>& rows, const Measured<Scalar, N>& m, const Longs& size,
                         Lanes* gamma, Longs& lost) {
    Lanes y[kMost][N], s[kMost][N], A[kMost][kMost];
    const bool by_steps = ring.kind == Kind::kAndersonI || ring.kind == Kind::kBroydenGood;
    Lanes newer_r[N], newer_z[N];
    for (int e = 0; e < N; ++e) newer_r[e] = m.r[e], newer_z[e] = m.f[e] - m.r[e];
    int n = 0;
    for (; n < kMost && any(size > n); ++n) {
      Lanes next[N], value[N];
      rows.residual(n + 1, next);
      if (by_steps) rows.value(n + 1, value);
      for (int e = 0; e < N; ++e) {
        y[n][e] = newer_r[e] - next[e];
        newer_r[e] = next[e];
        if (!by_steps) continue;
        const Lanes next_z = value[e] - next[e];
        s[n][e] = newer_z[e] - next_z;
        newer_z[e] = next_z;
      }
    }
    const auto& w = by_steps ? s : y;
    for (int i = 0; i < n; ++i) {
      gamma[i] = dot<N>(w[i], m.r);
      for (int j = 0; j < n; ++j) {
        A[i][j] = ring.kind == Kind::kBroydenBad && i < j ? Lanes{} : dot<N>(w[i], y[j]);
        if (ring.kind == Kind::kBroydenGood && i < j) A[i][j] += dot<N>(s[i], s[j]);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      const int own = static_cast<int>(size[l]);
      double matrix[kMost * kMost], x[kMost], scales[kMost];
      int order[kMost];
      for (int i = 0; i < own; ++i) {
        x[i] = gamma[i][l];
        for (int j = 0; j < own; ++j) matrix[i * own + j] = A[i][j][l];
      }
      const double squares[2] = {m.rr[l], m.ff[l]};
      const int dropped = solve_system(ring.kind, own, matrix, x, scales, order, ring.ridge, squares, ring.eps);
      lost[l] = own > 0 && dropped > 0 ? -1 : 0;
      for (int i = 0; i < n; ++i) gamma[i][l] = i < own ? x[i] : 0;
    }
    return n;
  }

  const Ring& ring;
};

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
