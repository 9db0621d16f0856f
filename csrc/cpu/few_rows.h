// The rows of kLanes samples of a few unknowns: an entry of all of them is one
// vector. Included by few_cpu.cpp alone, once per instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core.h"
#include "cpu/few_lanes.h"
#include "few.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

inline void fetch(const void* p) { __builtin_prefetch(p); }

// What is measured of the samples in the lanes.
template <class Scalar, int N>
struct Measured {
  Lanes f[N], r[N];      // r as the ring keeps it
  Lanes rr, ff;          // sums of squares of f - z and of f
  Lanes residual, size;  // their norms
};

// full: every lane has a sample of its own.
template <class Scalar, int N, bool full>
class FewRows {
 public:
  explicit FewRows(const FewCall& call)
      : c(call),
        R(static_cast<Scalar*>(call.ring.R)),
        F(static_cast<Scalar*>(call.ring.F)),
        f(static_cast<const Scalar*>(call.f)),
        z(static_cast<const Scalar*>(call.z)),
        z_next(static_cast<Scalar*>(call.z_next)),
        best(static_cast<Scalar*>(call.best)) {}

  const std::int64_t* samples() const { return samples_; }

  // The k samples from i on; lanes beyond them repeat the last.
  void choose(std::int64_t i, int k) {
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) {
      const std::int64_t j = i + (full || l < k ? l : k - 1);
      samples_[l] = c.rows ? c.rows[j] : j;
      history_[l] = samples_[l] * N;
      state_[l] = (c.wide ? samples_[l] : j) * N;
    }
    lanes_ = k;
    together_ = full && sizeof(Scalar) > 2 && samples_[kLanes - 1] - samples_[0] == kLanes - 1;
    states_together_ = full && sizeof(Scalar) > 2 && (!c.wide || together_);
    if (full && c.rows && samples_[kLanes - 1] - samples_[0] != kLanes - 1) fetch_ahead(i);
  }

  // r = f - z into the newest row, f too, and the norms.
  Measured<Scalar, N> measure() {
    Measured<Scalar, N> m{};
    Entry<Scalar> value[N], before[N], r[N] = {};
    load(f, state_, states_together_, value), load(z, state_, states_together_, before);
    Lanes most_r{}, most_f{}, exact[N];
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) {
      r[e] = value[e] - before[e];
      exact[e] = converted<Lanes>(r[e]);
      m.f[e] = converted<Lanes>(value[e]);
      if (c.rule.norm == Norm::kMax) most_r = larger(most_r, exact[e]), most_f = larger(most_f, m.f[e]);
      if constexpr (sizeof(Scalar) == 2) {
        float rounded[kLanes];  // GCC takes r for unset where its lanes are written one by one
        for (int l = 0; l < kLanes; ++l) rounded[l] = static_cast<float>(kept<Scalar>(r[e][l]));
        std::memcpy(&r[e], rounded, sizeof rounded);
      }
      m.r[e] = converted<Lanes>(r[e]);
    }
    m.rr = dot<N>(exact, exact), m.ff = dot<N>(m.f, m.f);
    if (c.ring.slots > 1) {
      const std::int64_t newest = c.ring.head * c.ring.slot_stride;
      store(r, R + newest, history_, together_);
      copy(f, state_, F + newest, history_);
    }
    const LanesRoot root;
    if (c.rule.norm == Norm::kMax) {
      m.residual = m.rr - m.rr == Lanes{} ? most_r : m.rr;
      m.size = m.ff - m.ff == Lanes{} ? most_f : m.ff;
    } else {
      m.residual = root(m.rr / c.rule.divisor), m.size = root(m.ff / c.rule.divisor);
    }
    return m;
  }

  // r, or f, of the sample in each lane, at some age, to out (N,).
  void residual(int age, Lanes* out) const { row(R, age, out); }
  void value(int age, Lanes* out) const { row(F, age, out); }

  // Copies z of the lanes `improved` to where the best iterates are.
  void keep_best(const Longs& improved) {
    if (!any(~improved)) return copy(z, state_, best, history_);
    if (!any(improved)) return;
#pragma GCC unroll 8
    for (int l = 0; l < (full ? kLanes : lanes_); ++l) {
      if (improved[l]) std::memcpy(best + history_[l], z + state_[l], N * sizeof(Scalar));
    }
  }

  bool is_zero(int lane) const {
    for (int e = 0; e < N; ++e) {
      if (static_cast<Wide<Scalar>>(z[state_[lane] + e]) != 0) return false;
    }
    return true;
  }

  // The next iterates: f - sum_a gamma_a (f_a - f_{a+1}) of `used` differences,
  // damped; f of age 1 where rejected.
  void mix(const Measured<Scalar, N>& m, int used, const Lanes* gamma, const Longs& rejected) {
    const double undamped = 1 - c.ring.damping;
    Lanes x[N], newer[N], newer_r[N];
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) {
      x[e] = newer[e] = m.f[e], newer_r[e] = m.r[e];
      if (undamped != 0) x[e] -= undamped * newer_r[e];
    }
    for (int a = 0; a < used; ++a) {
      const Longs takes = gamma[a] != Lanes{};  // 0 times infinity is NaN
      Lanes next[N];
      value(a + 1, next);
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        x[e] -= gamma[a] * (takes ? newer[e] - next[e] : Lanes{});
        newer[e] = next[e];
      }
      if (undamped == 0) continue;
      residual(a + 1, next);
      for (int e = 0; e < N; ++e) {
        x[e] += gamma[a] * undamped * (takes ? newer_r[e] - next[e] : Lanes{});
        newer_r[e] = next[e];
      }
    }
    if (any(rejected)) {
      value(1, newer), residual(1, newer_r);
      for (int e = 0; e < N; ++e) {
        const Lanes back = undamped == 0 ? newer[e] : newer[e] - undamped * newer_r[e];
        x[e] = rejected ? back : x[e];
      }
    }
    Entry<Scalar> out[N];
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) out[e] = converted<Entry<Scalar>>(x[e]);
    store(out, z_next, state_, states_together_);
  }

  // z_next of finished samples: their best iterates.
  void freeze(const Longs& finished) {
#pragma GCC unroll 8
    for (int l = 0; l < (full ? kLanes : lanes_); ++l) {
      if (finished[l]) std::memcpy(z_next + state_[l], best + history_[l], N * sizeof(Scalar));
    }
  }

 private:
  static Lanes larger(const Lanes& most, const Lanes& x) {
    const Lanes size = x < Lanes{} ? -x : x;
    return size <= most ? most : size;
  }
  void row(const Scalar* rows, int age, Lanes* out) const {
    Entry<Scalar> entries[N];
    load(rows + slot_of(c.ring.head, age, c.ring.slots) * c.ring.slot_stride, history_, together_, entries);
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) out[e] = converted<Lanes>(entries[e]);
  }

  // What groups to come will read of samples that lie apart: no two of them
  // share a line.
  void fetch_ahead(std::int64_t i) const {
    constexpr int kAhead = 3 * kLanes;
    if (i + kAhead + kLanes > c.n) return;
    const int ages = c.ring.slots - 1 < N + 1 ? c.ring.slots - 1 : N + 1;
    for (std::int64_t j = i + kAhead; j < i + kAhead + kLanes; ++j) {
      const std::int64_t sample = c.rows[j];
      fetch(c.records + sample);
      if (c.wide) fetch(f + sample * N), fetch(z + sample * N), fetch(z_next + sample * N);
      fetch(best + sample * N);
      for (int a = 0; a <= ages; ++a) {
        const std::int64_t row = slot_of(c.ring.head, a, c.ring.slots) * c.ring.slot_stride + sample * N;
        fetch(R + row), fetch(F + row);
      }
    }
  }

  // Of the samples in the lanes, which lie `together` or anywhere.
  static void load(const Scalar* from, const std::int64_t* offsets, bool together, Entry<Scalar>* entries) {
    if constexpr (full && sizeof(Scalar) > 2) {
      if (together) {
        Entry<Scalar> memory[N];
        std::memcpy(memory, from + offsets[0], sizeof memory);
        return by_entry<N>(memory, entries);
      }
    }
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) entries[e] = gathered(from + e, offsets);
  }
  void store(const Entry<Scalar>* entries, Scalar* to, const std::int64_t* offsets, bool together) const {
    if constexpr (full && sizeof(Scalar) > 2) {
      if (together) {
        Entry<Scalar> memory[N];
        by_sample<N>(entries, memory);
        std::memcpy(to + offsets[0], memory, sizeof memory);
        return;
      }
    }
#pragma GCC unroll 8
    for (int l = 0; l < (full ? kLanes : lanes_); ++l) {
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) to[offsets[l] + e] = static_cast<Scalar>(entries[e][l]);
    }
  }
  void copy(const Scalar* from, const std::int64_t* offsets, Scalar* to, const std::int64_t* places) const {
    if (together_ && states_together_) {
      std::memcpy(to + places[0], from + offsets[0], kLanes * N * sizeof(Scalar));
      return;
    }
#pragma GCC unroll 8
    for (int l = 0; l < (full ? kLanes : lanes_); ++l) {
      std::memcpy(to + places[l], from + offsets[l], N * sizeof(Scalar));
    }
  }

  const FewCall& c;
  Scalar *const R, *const F;
  const Scalar *const f, *const z;
  Scalar *const z_next, *const best;
  std::int64_t samples_[kLanes], history_[kLanes], state_[kLanes];
  int lanes_ = 0;
  bool together_ = false,
       states_together_ = false;  // in memory, in the order of the lanes
};

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
