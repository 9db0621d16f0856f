// Vectors of doubles and of floats. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
// GCC 12 takes the deliberately undefined registers in its own header for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));  // as many, in half a register
typedef float Floats __attribute__((vector_size(2 * kLanes * sizeof(float))));  // a whole register

inline Lanes widen(const Lanes& v) { return v; }
inline Lanes widen(const FloatLanes& v) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX__)
  return (Lanes)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Lanes);
#endif
}

inline FloatLanes to_float(const Lanes& v) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX__)
  return (FloatLanes)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, FloatLanes);
#endif
}
// One vector type as another, wider or narrower.
template <class To, class From>
inline To converted(const From& v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<To, Lanes>) {
    return widen(v);
  } else {
    return to_float(v);
  }
}

// The lower half of a register of floats, and the upper one.
inline Lanes lower(const Floats& v) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif defined(__AVX__)
  return (Lanes)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#else
  return Lanes{v[0], v[1]};
#endif
}
inline Lanes upper(const Floats& v) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX__)
  return (Lanes)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  return Lanes{v[2], v[3]};
#endif
}

inline Floats paired(const Lanes& low, const Lanes& high) {
  const FloatLanes halves[2] = {to_float(low), to_float(high)};
  Floats v;
  std::memcpy(&v, halves, sizeof v);
  return v;
}

// x in every lane of a vector, of doubles or floats.
template <class Vector>
inline Vector all(double x) {
  return static_cast<std::remove_reference_t<decltype(Vector{}[0])>>(x) - Vector{};
}

struct LanesRoot {
  Lanes operator()(const Lanes& v) const {
#if defined(__AVX512F__)
    return (Lanes)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX__)
    return (Lanes)_mm256_sqrt_pd((__m256d)v);
#else
    return Lanes{__builtin_sqrt(v[0]), __builtin_sqrt(v[1])};
#endif
  }
};

// Halves are added to halves, so the order is that of a tree.
inline double sum_lanes(const Lanes& v) {
#if defined(__AVX512F__)
  const __m256d quarter = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
#elif defined(__AVX__)
  const __m256d quarter = (__m256d)v;
#endif
#if defined(__AVX__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(quarter), _mm256_extractf128_pd(quarter, 1));
  return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
#else
  return v[0] + v[1];
#endif
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
