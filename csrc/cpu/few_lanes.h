// Vectors of one entry of kLanes samples. Included by few_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/loads.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

using Longs = decltype(Lanes{} < Lanes{});  // a mask, or integers

inline bool any(const Longs& mask) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_pd((__m256d)mask) != 0;
#else
  return (mask[0] | mask[1]) != 0;
#endif
}

// An entry of kLanes samples as it is computed with: float for all but double.
template <class Scalar>
using Entry = std::conditional_t<std::is_same_v<Scalar, double>, Lanes, FloatLanes>;

// One entry of the sample in each lane, `first` that of an offset of zero.
template <class Scalar>
inline Entry<Scalar> gathered(const Scalar* first, const std::int64_t* offsets) {
  const auto x = [&](int l) { return static_cast<Wide<Scalar>>(first[offsets[l]]); };
  if constexpr (kLanes == 2) {
    return Entry<Scalar>{x(0), x(1)};
  } else if constexpr (kLanes == 4) {
    return Entry<Scalar>{x(0), x(1), x(2), x(3)};
  } else {
    return Entry<Scalar>{x(0), x(1), x(2), x(3), x(4), x(5), x(6), x(7)};
  }
}

#if defined(__clang__)
template <class Vector, class Mask>
inline Vector shuffled(const Vector& a, const Vector& b, const Mask& mask) {
  Vector out{};
  for (int l = 0; l < kLanes; ++l) out[l] = mask[l] < kLanes ? a[mask[l]] : b[mask[l] - kLanes];
  return out;
}
#else
template <class Vector, class Mask>
inline Vector shuffled(const Vector& a, const Vector& b, const Mask& mask) {
  return __builtin_shuffle(a, b, mask);
}
#endif

// The N entries of kLanes samples that lie one after the other: by sample, as
// in memory, and by entry.
template <int N, class Vector>
inline void by_entry(const Vector* memory, Vector* entries) {
#pragma GCC unroll 4
  for (int e = 0; e < N; ++e) {
    Vector out = memory[0];
#pragma GCC unroll 4
    for (int part = 0; part < N; ++part) {
      decltype(out < out) mask{};
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) {
        mask[l] = (N * l + e) / kLanes == part ? kLanes + (N * l + e) % kLanes : l;
      }
      out = shuffled(out, memory[part], mask);
    }
    entries[e] = out;
  }
}
template <int N, class Vector>
inline void by_sample(const Vector* entries, Vector* memory) {
#pragma GCC unroll 4
  for (int part = 0; part < N; ++part) {
    Vector out = entries[0];
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) {
      decltype(out < out) mask{};
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) {
        const int at = part * kLanes + l;
        mask[l] = at % N == e ? kLanes + at / N : l;
      }
      out = shuffled(out, entries[e], mask);
    }
    memory[part] = out;
  }
}

// u.v of N entries, in the order of the row kernels: products that are rounded,
// then halves of four added to halves.
template <int N>
inline Lanes dot(const Lanes* u, const Lanes* v) {
  Lanes p[4] = {};
  for (int e = 0; e < N; ++e) {
    p[e] = u[e] * v[e];
#if defined(__AVX__)
    __asm__("" : "+v"(p[e]));  // else it would be part of a fused sum
#endif
  }
  return N == 1 ? p[0] : N == 2 ? p[0] + p[1] : N == 3 ? (p[0] + p[2]) + p[1] : (p[0] + p[2]) + (p[1] + p[3]);
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
