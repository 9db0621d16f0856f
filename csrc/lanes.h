// Vectors of doubles, and of the scalars they are read from. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

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
typedef float HalfLanes __attribute__((vector_size(kLanes * sizeof(float))));

template <class Scalar>
struct Vector;
template <>
struct Vector<double> {
  using type = Lanes;
};
template <>
struct Vector<float> {
  using type = HalfLanes;
};

template <class Scalar>
inline typename Vector<Scalar>::type read(const Scalar* p) {
  typename Vector<Scalar>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Lanes widen(const Lanes& v) { return v; }
// One instruction each; what GCC 12 makes of __builtin_convertvector takes four, and these bound the row kernels.
inline Lanes widen(const HalfLanes& v) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX__)
  return (Lanes)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Lanes);
#endif
}

template <class Scalar>
inline typename Vector<Scalar>::type narrow(const Lanes& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar) == 4) return (HalfLanes)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX__)
  if constexpr (sizeof(Scalar) == 4) return (HalfLanes)_mm256_cvtpd_ps((__m256d)v);
#endif
  return __builtin_convertvector(v, typename Vector<Scalar>::type);
}

inline Lanes broadcast(double x) {
  Lanes v;
  for (int l = 0; l < kLanes; ++l) v[l] = x;
  return v;
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

// `past_cache` stores do not first read the line they overwrite; they need whole, aligned vectors.
template <bool past_cache, class Scalar>
inline void write(Scalar* p, const typename Vector<Scalar>::type& v) {
#if defined(__AVX512F__)
  if constexpr (past_cache && sizeof(v) == 64) return _mm512_stream_pd(reinterpret_cast<double*>(p), (__m512d)v);
#endif
#if defined(__AVX__)
  if constexpr (past_cache && sizeof(v) == 32) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  if constexpr (past_cache && sizeof(v) == 16) return _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

inline void fence() {
#if defined(__AVX__)
  _mm_sfence();  // streamed stores are otherwise not ordered with the flag that tells other threads they are done
#endif
}

template <class Scalar>
inline bool is_aligned(const Scalar* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kLanes * sizeof(Scalar)) == 0;
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
