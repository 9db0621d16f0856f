// The sums and combinations over Krylov vectors, a tile of entries at a time: while it lies in registers, every vector
// is read once. Included by krylov_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/loads.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr int kTile = 8;  // vectors of doubles in a tile

inline Lanes get(const double* p) { return load(p); }
inline Lanes get(const float* p) { return widen(load(p)); }
inline void put(double* p, const Lanes& v) { std::memcpy(p, &v, sizeof v); }
inline void put(float* p, const Lanes& v) {
  const FloatLanes narrow = to_float(v);
  std::memcpy(p, &narrow, sizeof narrow);
}

// Numbers of one range of samples or pieces; lanes want lines of their own.
struct Scratch {
  explicit Scratch(std::int64_t doubles)
      : memory(std::calloc(static_cast<std::size_t>(doubles) + 16, sizeof(double))),
        data(reinterpret_cast<double*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64)) {
    if (!memory) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* memory;
  double* data;
};

// Sums of k products, kept as lanes while the entries go by.
struct Sums {
  explicit Sums(int k) : lanes(static_cast<std::int64_t>(k) * kLanes), tail(k), k(k) {}
  void clear() {
    for (int i = 0; i < k * kLanes; ++i) lanes.data[i] = 0;
    for (int i = 0; i < k; ++i) tail.data[i] = 0;
  }
  Lanes* of(int j) const { return reinterpret_cast<Lanes*>(lanes.data) + j; }
  void write(double* out) const {
    for (int j = 0; j < k; ++j) out[j] = sum_lanes(*of(j)) + tail.data[j];
  }
  Scratch lanes, tail;
  int k;
};

// Calls whole(entry, tag of W) for tiles of W vectors each and one(entry) for the entries that fill no vector.
template <int W>
struct Width {
  static constexpr int value = W;
};
template <class Tile, class One>
inline void for_tiles(std::int64_t first, std::int64_t last, const Tile& tile, const One& one) {
  std::int64_t e = first;
  for (; e + kTile * kLanes <= last; e += kTile * kLanes) tile(e, Width<kTile>{});
  for (; e + kLanes <= last; e += kLanes) tile(e, Width<1>{});
  for (; e < last; ++e) one(e);
}

// sums += q_j . w over the entries first ... last; row j of a sample begins at q[j] + row. A few vectors at a time, so
// that the processor sees few streams where they come from memory.
template <int R, class Scalar>
inline void dot_rows(int j, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last, const Scalar* w,
                     Sums& sums) {
  Lanes sum[R];
  const Scalar* p[R];
  for (int r = 0; r < R; ++r) sum[r] = *sums.of(j + r), p[r] = q[j + r] + row;
  std::int64_t e = first;
  for (; e + kLanes <= last; e += kLanes) {
    const Lanes x = get(w + e);
    for (int r = 0; r < R; ++r) sum[r] += x * get(p[r] + e);
  }
  for (int r = 0; r < R; ++r) *sums.of(j + r) = sum[r];
  for (; e < last; ++e) {
    for (int r = 0; r < R; ++r) sums.tail.data[j + r] += static_cast<double>(w[e]) * static_cast<double>(p[r][e]);
  }
}
template <class Scalar>
inline void dot(int k, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last, const Scalar* w,
                Sums& sums) {
  int j = 0;
  for (; j + 4 <= k; j += 4) dot_rows<4>(j, q, row, first, last, w, sums);
  for (; j < k; ++j) dot_rows<1>(j, q, row, first, last, w, sums);
}

// w -= sum_j h_j q_j over the entries first ... last, rounded to Scalar; with kDot then sums += q_j . w, else sums is
// not touched. Returns w . w.
template <bool kDot, class Scalar>
inline double subtract(int k, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last,
                       const double* h, Scalar* w, Sums& sums) {
  Lanes squares = {};
  double rest = 0;
  for_tiles(
      first, last,
      [&](std::int64_t e, auto width) {
        constexpr int W = decltype(width)::value;
        Lanes x[W];
        for (int v = 0; v < W; ++v) x[v] = get(w + e + v * kLanes);
        for (int j = 0; j < k; ++j) {
          const Lanes weight = all<Lanes>(h[j]);
          const Scalar* const p = q[j] + row + e;
          for (int v = 0; v < W; ++v) x[v] -= weight * get(p + v * kLanes);
        }
        for (int v = 0; v < W; ++v) put(w + e + v * kLanes, x[v]), x[v] = get(w + e + v * kLanes);
        for (int v = 0; v < W; ++v) squares += x[v] * x[v];
        if constexpr (kDot) {
          for (int j = 0; j < k; ++j) {
            const Scalar* const p = q[j] + row + e;
            Lanes sum = *sums.of(j);
            for (int v = 0; v < W; ++v) sum += x[v] * get(p + v * kLanes);
            *sums.of(j) = sum;
          }
        }
      },
      [&](std::int64_t e) {
        double x = w[e];
        for (int j = 0; j < k; ++j) x -= h[j] * static_cast<double>(q[j][row + e]);
        w[e] = static_cast<Scalar>(x), x = w[e];
        rest += x * x;
        if constexpr (kDot) {
          for (int j = 0; j < k; ++j) sums.tail.data[j] += x * static_cast<double>(q[j][row + e]);
        }
      });
  return sum_lanes(squares) + rest;
}

// out = u + sum_j y_j q_j, u zero where it is null.
template <class Scalar>
inline void combined(int k, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last, const double* y,
                     const Scalar* u, Scalar* out) {
  for_tiles(
      first, last,
      [&](std::int64_t e, auto width) {
        constexpr int W = decltype(width)::value;
        Lanes x[W] = {};
        if (u) {
          for (int v = 0; v < W; ++v) x[v] = get(u + e + v * kLanes);
        }
        for (int j = 0; j < k; ++j) {
          const Lanes weight = all<Lanes>(y[j]);
          const Scalar* const p = q[j] + row + e;
          for (int v = 0; v < W; ++v) x[v] += weight * get(p + v * kLanes);
        }
        for (int v = 0; v < W; ++v) put(out + e + v * kLanes, x[v]);
      },
      [&](std::int64_t e) {
        double x = u ? static_cast<double>(u[e]) : 0.0;
        for (int j = 0; j < k; ++j) x += y[j] * static_cast<double>(q[j][row + e]);
        out[e] = static_cast<Scalar>(x);
      });
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
