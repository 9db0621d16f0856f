// Vectors of doubles, and of the scalars they are read from. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scalar.h"

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
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::uint32_t WordLanes __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));
typedef std::uint16_t ShortLanes __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

// As a Scalar lies in memory, and as it is computed with. Two bfloat16 share a word: the upper one is a float once the
// lower is masked, the lower one after a shift, so a load of words fills two vectors, the even entries and the odd
// ones.
template <class Scalar>
struct Vector;
template <>
struct Vector<double> {
  using stored = Lanes;
  using wide = Lanes;
};
template <>
struct Vector<float> {
  using stored = FloatLanes;
  using wide = FloatLanes;
};
template <>
struct Vector<Half> {
  using stored = ShortLanes;
  using wide = FloatLanes;
};
template <>
struct Vector<BFloat16> {
  using stored = WordLanes;
  using wide = FloatLanes;
};
template <class Scalar>
using Stored = typename Vector<Scalar>::stored;
template <class Scalar>
using WideLanes = typename Vector<Scalar>::wide;
template <class Scalar>
constexpr int kChunk = static_cast<int>(sizeof(Stored<Scalar>) / sizeof(Scalar));  // entries of one load
template <class Scalar>
constexpr int kParts = kChunk<Scalar> / kLanes;  // vectors that it fills

template <class Scalar>
inline Stored<Scalar> load(const Scalar* p) {
  Stored<Scalar> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX__)
inline __m128i in_register(const ShortLanes& v) {
  __m128i whole = _mm_setzero_si128();
  std::memcpy(&whole, &v, sizeof v);
  return whole;
}
inline ShortLanes short_lanes(const __m128i& whole) {
  ShortLanes v;
  std::memcpy(&v, &whole, sizeof v);
  return v;
}
#endif

// Each conversion is written out where GCC 12 makes several instructions of __builtin_convertvector: they bound the row
// kernels.
template <class Scalar>
inline WideLanes<Scalar> expand(const Stored<Scalar>& v, [[maybe_unused]] int part) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    return (FloatLanes)(part == 0 ? v << 16 : v & 0xffff0000u);
  } else if constexpr (std::is_same_v<Scalar, Half>) {
#if defined(__AVX512F__)
    return (FloatLanes)_mm256_cvtph_ps(in_register(v));
#elif defined(__AVX__)
    return (FloatLanes)_mm_cvtph_ps(in_register(v));
#else
    FloatLanes wide;
    for (int l = 0; l < kLanes; ++l) {
      Half x;
      x.bits = v[l];
      wide[l] = static_cast<float>(x);
    }
    return wide;
#endif
  } else {
    return v;
  }
}
template <class Scalar>
inline WideLanes<Scalar> read(const Scalar* p, int part) {
  return expand<Scalar>(load(p), part);
}
inline Lanes read(const double* p) { return load(p); }

inline ShortLanes to_half(const FloatLanes& v) {
#if defined(__AVX512F__)
  return short_lanes(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__)
  return short_lanes(_mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT));
#else
  ShortLanes stored;
  for (int l = 0; l < kLanes; ++l) stored[l] = Half(v[l]).bits;
  return stored;
#endif
}

// The kParts vectors that one store takes, each entry to the nearest that a Scalar can hold. A NaN that came from
// bfloat16 has no bits below those it keeps, so rounding cannot carry it over to a number.
template <class Scalar>
inline Stored<Scalar> joined(const WideLanes<Scalar>* parts) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    const WordLanes even = (WordLanes)parts[0], odd = (WordLanes)parts[1];
    return (even + 0x7fffu + ((even >> 16) & 1u)) >> 16 | ((odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u);
  } else if constexpr (std::is_same_v<Scalar, Half>) {
    return to_half(parts[0]);
  } else {
    return parts[0];
  }
}
// Residuals as the ring keeps them: `kept` of scalar.h. NaN stays.
template <class Scalar>
inline FloatLanes in_range(const FloatLanes& v) {
  const FloatLanes most = FloatLanes{} + kLargest<Scalar>;
#if defined(__AVX512F__)
  return (FloatLanes)_mm256_max_ps((__m256)-most, _mm256_min_ps((__m256)most, (__m256)v));
#elif defined(__AVX__)
  return (FloatLanes)_mm_max_ps((__m128)-most, _mm_min_ps((__m128)most, (__m128)v));
#else
  return v > most ? most : v < -most ? -most : v;
#endif
}
template <class Scalar>
inline Stored<Scalar> joined_residuals(const WideLanes<Scalar>* parts) {
  if constexpr (sizeof(Scalar) == 2) {
    WideLanes<Scalar> kept[kParts<Scalar>];
    for (int part = 0; part < kParts<Scalar>; ++part) kept[part] = in_range<Scalar>(parts[part]);
    return joined<Scalar>(kept);
  } else {
    return joined<Scalar>(parts);
  }
}

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
inline void write(Scalar* p, const Stored<Scalar>& v) {
#if defined(__AVX512F__)
  if constexpr (past_cache && sizeof(v) == 64) return _mm512_stream_pd(reinterpret_cast<double*>(p), (__m512d)v);
#endif
#if defined(__AVX__)
  if constexpr (past_cache && sizeof(v) == 32) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  if constexpr (past_cache && sizeof(v) == 16) return _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
  if constexpr (past_cache && sizeof(v) == 8) {
    return _mm_stream_si64(reinterpret_cast<long long*>(p), _mm_cvtsi128_si64(in_register(v)));
  }
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
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(Stored<Scalar>) == 0;
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
