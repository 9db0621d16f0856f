// Vectors of doubles and the row kernels built on them: every row is read once, and everything it takes part in is
// accumulated in registers. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
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
inline Lanes widen(const HalfLanes& v) { return __builtin_convertvector(v, Lanes); }

template <class Scalar>
inline typename Vector<Scalar>::type narrow(const Lanes& v) {
  return __builtin_convertvector(v, typename Vector<Scalar>::type);
}

inline Lanes broadcast(double x) {
  Lanes v;
  for (int l = 0; l < kLanes; ++l) v[l] = x;
  return v;
}

inline double sum_lanes(const Lanes& v) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
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

constexpr int kMaxOlder = 10;  // differences kept in registers; more take the tiled kernel

// Fetches the rows of the next sample in the order of their addresses. Short rows read side by side would hide from the
// processor's own prefetching that the whole is one sequential stream.
template <class Scalar>
inline void prefetch(const Scalar* p, std::int64_t length) {
  const char* const bytes = reinterpret_cast<const char*>(p);
  for (std::int64_t i = 0; i < length * static_cast<std::int64_t>(sizeof(Scalar)); i += 64)
    __builtin_prefetch(bytes + i);
}
constexpr std::int64_t kShortRow = 2048;  // entries

// r = f - z over `length` entries, a multiple of kLanes: writes R0 = r and F0 = f, and with y_a = r_a - r_{a+1} adds
// dots[a] += y_0.y_a, dots[C + a] += r.y_a, dots[2C] += r.r, dots[2C + 1] += f.f.
template <class Scalar, int C>
void measure_rows(std::int64_t length, const Scalar* f, const Scalar* z, Scalar* R0, Scalar* F0,
                  const Scalar* const* older, double* dots) {
  Lanes gram[C + 1], rhs[C + 1], rr = {}, ff = {};
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) gram[a] = rhs[a] = Lanes{};
  for (std::int64_t i = 0; i < length; i += kLanes) {
    const auto f_row = read(f + i), r_row = f_row - read(z + i);
    write<false>(R0 + i, r_row);
    write<false>(F0 + i, f_row);
    const Lanes r = widen(r_row), value = widen(f_row);
    rr += r * r;
    ff += value * value;
    Lanes newer = r, y0 = {};
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) {
      const Lanes next = widen(read(older[a] + i)), y = newer - next;
      if (a == 0) y0 = y;
      gram[a] += y * y0;
      rhs[a] += y * r;
      newer = next;
    }
  }
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) {
    dots[a] += sum_lanes(gram[a]);
    dots[C + a] += sum_lanes(rhs[a]);
  }
  dots[2 * C] += sum_lanes(rr);
  dots[2 * C + 1] += sum_lanes(ff);
}

// out = F_0 - sum_a weight[a] (F_a - F_{a+1}) over `length` entries, a multiple of kLanes; rows[0] is F_0.
template <class Scalar, int C, bool past_cache>
void mix_rows(std::int64_t length, const Scalar* const* rows, const double* weight, Scalar* out) {
  Lanes w[C + 1];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) w[a] = broadcast(weight[a]);
  for (std::int64_t i = 0; i < length; i += kLanes) {
    Lanes newer = widen(read(rows[0] + i)), x = newer;
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) {
      const Lanes next = widen(read(rows[a + 1] + i));
      x -= w[a] * (newer - next);
      newer = next;
    }
    write<past_cache>(out + i, narrow<Scalar>(x));
  }
}

// The instances by number of differences C = 0 … kMaxOlder.
template <class Scalar, int C = 0>
void measure_rows_of(int differences, std::int64_t length, const Scalar* f, const Scalar* z, Scalar* R0, Scalar* F0,
                     const Scalar* const* older, double* dots) {
  if (differences == C) return measure_rows<Scalar, C>(length, f, z, R0, F0, older, dots);
  if constexpr (C < kMaxOlder) {
    measure_rows_of<Scalar, C + 1>(differences, length, f, z, R0, F0, older, dots);
  }
}

template <class Scalar, bool past_cache, int C = 0>
void mix_rows_of(int differences, std::int64_t length, const Scalar* const* rows, const double* weight, Scalar* out) {
  if (differences == C) return mix_rows<Scalar, C, past_cache>(length, rows, weight, out);
  if constexpr (C < kMaxOlder) mix_rows_of<Scalar, past_cache, C + 1>(differences, length, rows, weight, out);
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
