// Scalars as they lie in memory: how vectors are read from them and written to them. Included by step_cpu.cpp alone,
// once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "scalar.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

typedef std::uint32_t Words __attribute__((vector_size(sizeof(Floats))));
typedef std::uint16_t Shorts __attribute__((vector_size(sizeof(Floats) / 2)));

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
  using stored = Shorts;
  using wide = Floats;
};
template <>
struct Vector<BFloat16> {
  using stored = Words;
  using wide = Floats;
};
template <class Scalar>
using Stored = typename Vector<Scalar>::stored;
template <class Scalar>
using WideLanes = typename Vector<Scalar>::wide;
template <class Scalar>
constexpr int kChunk = static_cast<int>(sizeof(Stored<Scalar>) / sizeof(Scalar));  // entries of one load
template <class Scalar>
constexpr int kWidth = static_cast<int>(sizeof(WideLanes<Scalar>) / sizeof(Wide<Scalar>));  // entries of one vector
template <class Scalar>
constexpr int kParts = kChunk<Scalar> / kWidth<Scalar>;  // vectors that a load fills

template <class Scalar>
inline Stored<Scalar> load(const Scalar* p) {
  Stored<Scalar> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Each conversion is written out where GCC 12 makes several instructions of __builtin_convertvector: they bound the row
// kernels.
template <class Scalar>
inline WideLanes<Scalar> expand(const Stored<Scalar>& v, [[maybe_unused]] int part) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    return (Floats)(part == 0 ? v << 16 : v & 0xffff0000u);
  } else if constexpr (std::is_same_v<Scalar, Half>) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX__)
    return (Floats)_mm256_cvtph_ps((__m128i)v);
#else
    Floats wide;
    for (int l = 0; l < kWidth<Half>; ++l) {
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

// Whether part of a load can be read and written alone: what lies beyond a short row is another sample's.
template <class Scalar>
#if defined(__AVX__)
constexpr bool kMasked = sizeof(Scalar) > 2;
#else
constexpr bool kMasked = false;
#endif

#if defined(__AVX__)
constexpr std::int32_t kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
constexpr std::int64_t kWideOnes[8] = {-1, -1, -1, -1};

// The first `count` entries from p on, kChunk at most, and zeros.
inline FloatLanes load_some(const float* p, int count) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - count)));
#else
  return (FloatLanes)_mm_maskload_ps(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kOnes + 8 - count)));
#endif
}
inline Lanes load_some(const double* p, int count) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1 << count) - 1), p);
#else
  return (Lanes)_mm256_maskload_pd(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWideOnes + 4 - count)));
#endif
}
inline void write_some(float* p, int count, const FloatLanes& v) {
#if defined(__AVX512F__)
  _mm256_maskstore_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - count)), (__m256)v);
#else
  _mm_maskstore_ps(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kOnes + 8 - count)), (__m128)v);
#endif
}
inline void write_some(double* p, int count, const Lanes& v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1 << count) - 1), (__m512d)v);
#else
  _mm256_maskstore_pd(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWideOnes + 4 - count)), (__m256d)v);
#endif
}
#endif

inline Shorts to_half(const Floats& v) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX__)
  return (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Shorts stored;
  for (int l = 0; l < kWidth<Half>; ++l) stored[l] = Half(v[l]).bits;
  return stored;
#endif
}

// The kParts vectors that one store takes, each entry to the nearest that a Scalar can hold. A NaN that came from
// bfloat16 has no bits below those it keeps, so rounding cannot carry it over to a number.
template <class Scalar>
inline Stored<Scalar> joined(const WideLanes<Scalar>* parts) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    const Words even = (Words)parts[0], odd = (Words)parts[1];
    return (even + 0x7fffu + ((even >> 16) & 1u)) >> 16 | ((odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u);
  } else if constexpr (std::is_same_v<Scalar, Half>) {
    return to_half(parts[0]);
  } else {
    return parts[0];
  }
}
// Residuals as the ring keeps them: `kept` of scalar.h. NaN stays.
template <class Scalar>
inline Floats in_range(const Floats& v) {
  const Floats most = Floats{} + kLargest<Scalar>;
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)-most, _mm512_min_ps((__m512)most, (__m512)v));
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)-most, _mm256_min_ps((__m256)most, (__m256)v));
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

// `past_cache` stores do not first read the line they overwrite; they need whole, aligned vectors.
template <bool past_cache, class Scalar>
inline void write(Scalar* p, const Stored<Scalar>& v) {
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
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(Stored<Scalar>) == 0;
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
