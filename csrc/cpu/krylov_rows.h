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

// w -= sum_j h_j q_j over the entries first ... last (none where h is null), rounded to Scalar, then sums += q_j . w.
// Row j of a sample begins at q[j] + row.
template <class Scalar>
inline void subtract_and_dot(int k, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last,
                             const double* h, Scalar* w, Sums& sums) {
  for_tiles(
      first, last,
      [&](std::int64_t e, auto width) {
        constexpr int W = decltype(width)::value;
        Lanes x[W];
        for (int v = 0; v < W; ++v) x[v] = get(w + e + v * kLanes);
        if (h) {
          for (int j = 0; j < k; ++j) {
            const Lanes weight = all<Lanes>(h[j]);
            const Scalar* const p = q[j] + row + e;
            for (int v = 0; v < W; ++v) x[v] -= weight * get(p + v * kLanes);
          }
          for (int v = 0; v < W; ++v) put(w + e + v * kLanes, x[v]), x[v] = get(w + e + v * kLanes);
        }
        for (int j = 0; j < k; ++j) {
          const Scalar* const p = q[j] + row + e;
          Lanes sum = *sums.of(j);
          for (int v = 0; v < W; ++v) sum += x[v] * get(p + v * kLanes);
          *sums.of(j) = sum;
        }
      },
      [&](std::int64_t e) {
        double x = w[e];
        if (h) {
          for (int j = 0; j < k; ++j) x -= h[j] * static_cast<double>(q[j][row + e]);
          w[e] = static_cast<Scalar>(x), x = w[e];
        }
        for (int j = 0; j < k; ++j) sums.tail.data[j] += x * static_cast<double>(q[j][row + e]);
      });
}

// The same without sums but that of w . w, which it returns.
template <class Scalar>
inline double subtract(int k, Scalar* const* q, std::int64_t row, std::int64_t first, std::int64_t last,
                       const double* h, Scalar* w) {
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
      },
      [&](std::int64_t e) {
        double x = w[e];
        for (int j = 0; j < k; ++j) x -= h[j] * static_cast<double>(q[j][row + e]);
        w[e] = static_cast<Scalar>(x), x = w[e];
        rest += x * x;
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

// 2^exponent in two factors that are normal numbers, and x times it: exact wherever the product is a number of Scalar.
struct Power {
  explicit Power(int exponent) : low(power(exponent / 2)), high(power(exponent - exponent / 2)) {}
  static double power(int e) {
    const std::uint64_t bits = static_cast<std::uint64_t>(e + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  template <class Number>
  Number operator()(const Number& x) const {
    return x * low * high;
  }
  double low, high;
};

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
