// The row kernels: every row is read once, and everything it takes part in is accumulated in registers. Included by
// step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr int kMaxOlder = 10;  // differences kept in registers; more take the tiled kernel
template <class Scalar>
constexpr int kLine = 64 / static_cast<int>(sizeof(Scalar));  // entries of one cache line, a multiple of kChunk

// How far from a row of this block the same row of a coming one lies, in entries: it is fetched while this one is
// worked on, because short rows read side by side hide from the processor that the whole is one stream. 0: not fetched.
struct Ahead {
  std::int64_t states = 0;   // of f and z
  std::int64_t history = 0;  // of R and F
};

inline void fetch(const void* p) { __builtin_prefetch(p); }

// Writes R0 = r, which is f - z as kept, and F0 = f over `length` entries, whole lines. With y_a = r_a - r_{a+1} adds
// dots[a] += y_0.y_a, dots[C + a] += r.y_a, dots[2C] += |f - z|^2, dots[2C + 1] += f.f.
template <class Scalar, int C, bool past_cache>
void measure_rows(std::int64_t length, const Scalar* f, const Scalar* z, Scalar* R0, Scalar* F0, const Scalar* const* R,
                  Ahead ahead, double* dots) {
  Lanes gram[C + 1], rhs[C + 1], rr = {}, ff = {};
  const Scalar* older[C + 1];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) gram[a] = rhs[a] = Lanes{}, older[a] = R[a];
  for (std::int64_t line = 0; line < length; line += kLine<Scalar>) {
    if (ahead.history != 0) {
      fetch(f + ahead.states + line);
      fetch(z + ahead.states + line);
#pragma GCC unroll 16
      for (int a = 0; a < C; ++a) fetch(older[a] + ahead.history + line);
    }
#pragma GCC unroll 8
    for (std::int64_t i = line; i < line + kLine<Scalar>; i += kChunk<Scalar>) {
      WideLanes<Scalar> exact[kParts<Scalar>];
#pragma GCC unroll 2
      for (int part = 0; part < kParts<Scalar>; ++part) exact[part] = read(f + i, part) - read(z + i, part);
      const auto r_row = joined_residuals<Scalar>(exact), f_row = load(f + i);
      write<past_cache>(R0 + i, r_row);
      write<past_cache>(F0 + i, f_row);
#pragma GCC unroll 2
      for (int part = 0; part < kParts<Scalar>; ++part) {
        const Lanes r = widen(expand<Scalar>(r_row, part)), value = widen(expand<Scalar>(f_row, part));
        rr += widen(exact[part]) * widen(exact[part]);
        ff += value * value;
        Lanes newer = r, y0 = {};
#pragma GCC unroll 16
        for (int a = 0; a < C; ++a) {
          const Lanes next = widen(read(older[a] + i, part)), y = newer - next;
          if (a == 0) y0 = y;
          gram[a] += y * y0;
          rhs[a] += y * r;
          newer = next;
        }
      }
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

// out = F_0 - sum_a weight[a] (F_a - F_{a+1}) over `length` entries, whole lines; rows[0] is F_0. In float where rows
// have 16 bits: what that rounds off is 2^-13 and less of what the weights make of the rounding of F.
template <class Scalar, int C, bool past_cache>
void mix_rows(std::int64_t length, const Scalar* const* rows, const double* weight, Ahead ahead, Scalar* out) {
  using Number = std::conditional_t<sizeof(Scalar) == 2, FloatLanes, Lanes>;
  Number w[C + 1];
  const Scalar* F[C + 1];
  F[0] = rows[0];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) w[a] = converted<Number>(broadcast(weight[a])), F[a + 1] = rows[a + 1];
  for (std::int64_t line = 0; line < length; line += kLine<Scalar>) {
    if (ahead.history != 0) {
#pragma GCC unroll 16
      for (int a = 0; a < C; ++a) fetch(F[a + 1] + ahead.history + line);
    }
#pragma GCC unroll 8
    for (std::int64_t i = line; i < line + kLine<Scalar>; i += kChunk<Scalar>) {
      WideLanes<Scalar> out_parts[kParts<Scalar>];
#pragma GCC unroll 2
      for (int part = 0; part < kParts<Scalar>; ++part) {
        Number newer = converted<Number>(read(F[0] + i, part)), x = newer;
#pragma GCC unroll 16
        for (int a = 0; a < C; ++a) {
          const Number next = converted<Number>(read(F[a + 1] + i, part));
          x -= w[a] * (newer - next);
          newer = next;
        }
        out_parts[part] = converted<WideLanes<Scalar>>(x);
      }
      write<past_cache>(out + i, joined<Scalar>(out_parts));
    }
  }
}

// The instances by number of differences C = 0 … kMaxOlder.
template <class Scalar, bool past_cache, int C = 0>
void measure_rows_of(int differences, std::int64_t length, const Scalar* f, const Scalar* z, Scalar* R0, Scalar* F0,
                     const Scalar* const* older, Ahead ahead, double* dots) {
  if (differences == C) return measure_rows<Scalar, C, past_cache>(length, f, z, R0, F0, older, ahead, dots);
  if constexpr (C < kMaxOlder) {
    measure_rows_of<Scalar, past_cache, C + 1>(differences, length, f, z, R0, F0, older, ahead, dots);
  }
}

template <class Scalar, bool past_cache, int C = 0>
void mix_rows_of(int differences, std::int64_t length, const Scalar* const* rows, const double* weight, Ahead ahead,
                 Scalar* out) {
  if (differences == C) return mix_rows<Scalar, C, past_cache>(length, rows, weight, ahead, out);
  if constexpr (C < kMaxOlder) mix_rows_of<Scalar, past_cache, C + 1>(differences, length, rows, weight, ahead, out);
}

// A whole piece: whole lines where they lie, the rest through padded copies (zeros leave every sum unchanged).
// R[0] and F receive the newest rows; R[a + 1] are the older ones. sums as `dots` above.
template <class Scalar>
void measure_piece(std::int64_t length, int older, const Scalar* f, const Scalar* z, Scalar* const* R, Scalar* F,
                   Ahead ahead, bool past_cache, double* sums) {
  constexpr int line = kLine<Scalar>;
  const std::int64_t whole = length / line * line;
  const Scalar* rows[kMaxOlder + 1];
  for (int a = 0; a < older; ++a) rows[a] = R[a + 1];
  if (past_cache && is_aligned(R[0]) && is_aligned(F)) {
    measure_rows_of<Scalar, true>(older, whole, f, z, R[0], F, rows, ahead, sums);
  } else {
    measure_rows_of<Scalar, false>(older, whole, f, z, R[0], F, rows, ahead, sums);
  }
  if (whole == length) return;
  Scalar padded[kMaxOlder + 5][line] = {};
  const std::size_t bytes = (length - whole) * sizeof(Scalar);
  std::memcpy(padded[kMaxOlder + 1], f + whole, bytes);
  std::memcpy(padded[kMaxOlder + 2], z + whole, bytes);
  for (int a = 0; a < older; ++a) {
    std::memcpy(padded[a], rows[a] + whole, bytes);
    rows[a] = padded[a];
  }
  measure_rows_of<Scalar, false>(older, line, padded[kMaxOlder + 1], padded[kMaxOlder + 2], padded[kMaxOlder + 3],
                                 padded[kMaxOlder + 4], rows, {}, sums);
  std::memcpy(R[0] + whole, padded[kMaxOlder + 3], bytes);
  std::memcpy(F + whole, padded[kMaxOlder + 4], bytes);
}

// Changes `rows` when a copy is needed.
template <class Scalar>
void mix_piece(std::int64_t length, int differences, Ahead ahead, bool past_cache, const Scalar** rows,
               const double* weight, Scalar* out) {
  constexpr int line = kLine<Scalar>;
  const std::int64_t whole = length / line * line;
  if (past_cache && is_aligned(out)) {
    mix_rows_of<Scalar, true>(differences, whole, rows, weight, ahead, out);
  } else {
    mix_rows_of<Scalar, false>(differences, whole, rows, weight, ahead, out);
  }
  if (whole == length) return;
  Scalar padded[kMaxOlder + 2][line] = {};
  const std::size_t bytes = (length - whole) * sizeof(Scalar);
  for (int a = 0; a <= differences; ++a) {
    std::memcpy(padded[a], rows[a] + whole, bytes);
    rows[a] = padded[a];
  }
  mix_rows_of<Scalar, false>(differences, line, rows, weight, {}, padded[kMaxOlder + 1]);
  std::memcpy(out + whole, padded[kMaxOlder + 1], bytes);
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
