// The row kernels: every row is read once, and everything it takes part in is accumulated in registers. Included by
// step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

// Differences whose sums stay in registers; more take the tiled kernel.
constexpr int kMaxOlder = 10;
constexpr int most_older(bool steps) { return steps ? 7 : kMaxOlder; }
template <class Scalar>
constexpr int kLine = 64 / static_cast<int>(sizeof(Scalar));  // entries of one cache line, a multiple of kChunk

// How far from a row of this block the same row of a coming one lies, in entries: it is fetched while this one is
// worked on, because short rows read side by side hide from the processor that the whole is one stream. 0: not fetched.
struct Ahead {
  std::int64_t states = 0;   // of f and z
  std::int64_t history = 0;  // of R and F
};

inline void fetch(const void* p) { __builtin_prefetch(p); }

// The rows that a measurement reads and writes. R[0] and F[0] receive the newest; R[a + 1] and F[a + 1] are older ones,
// of which F is read only where steps are.
template <class Scalar>
struct RowsOf {
  Scalar* R[kMaxOlder + 1];
  Scalar* F[kMaxOlder + 1];
};

// Writes R[0] = r, which is f - z as kept, and F[0] = f over `length` entries, whole lines. With differences by age
// y_a = r_a - r_{a+1} and steps s_a = z_a - z_{a+1}, z = f - r, adds
//   without steps: y_0.y_a, y_a.r;  with steps: s_a.y_0, s_a.r, s_0.y_a, s_0.s_a;  C of each, one kind after the other,
// and then |f - z|^2 and f.f, to dots.
template <class Scalar, int C, bool past_cache, bool steps>
void measure_rows(std::int64_t length, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows, Ahead ahead,
                  double* dots) {
  constexpr int kSums = steps ? 4 : 2;
  Lanes sums[kSums][C + 1], rr = {}, ff = {};
  const Scalar *R[C + 1], *F[C + 1];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) sums[k][a] = Lanes{};
    R[a] = rows.R[a + 1];
    if constexpr (steps) F[a] = rows.F[a + 1];
  }
  Scalar *R0 = rows.R[0], *F0 = rows.F[0];
  for (std::int64_t line = 0; line < length; line += kLine<Scalar>) {
    if (ahead.history != 0) {
      fetch(f + ahead.states + line);
      fetch(z + ahead.states + line);
#pragma GCC unroll 16
      for (int a = 0; a < C; ++a) {
        fetch(R[a] + ahead.history + line);
        if constexpr (steps) fetch(F[a] + ahead.history + line);
      }
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
        Lanes r_a = r, z_a = value - r, y_0 = {}, s_0 = {};
#pragma GCC unroll 16
        for (int a = 0; a < C; ++a) {
          const Lanes r_next = widen(read(R[a] + i, part)), y = r_a - r_next;
          if (a == 0) y_0 = y;
          r_a = r_next;
          if constexpr (steps) {
            const Lanes z_next = widen(read(F[a] + i, part)) - r_next, s = z_a - z_next;
            if (a == 0) s_0 = s;
            z_a = z_next;
            sums[0][a] += s * y_0;
            sums[1][a] += s * r;
            sums[2][a] += s_0 * y;
            sums[3][a] += s_0 * s;
          } else {
            sums[0][a] += y * y_0;
            sums[1][a] += y * r;
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kSums; ++k) {
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) dots[k * C + a] += sum_lanes(sums[k][a]);
  }
  dots[kSums * C] += sum_lanes(rr);
  dots[kSums * C + 1] += sum_lanes(ff);
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

// The instances by number of differences C = 0 … most_older.
template <class Scalar, bool past_cache, bool steps, int C = 0>
void measure_rows_of(int differences, std::int64_t length, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows,
                     Ahead ahead, double* dots) {
  if (differences == C) return measure_rows<Scalar, C, past_cache, steps>(length, f, z, rows, ahead, dots);
  if constexpr (C < most_older(steps)) {
    measure_rows_of<Scalar, past_cache, steps, C + 1>(differences, length, f, z, rows, ahead, dots);
  }
}

template <class Scalar, bool past_cache, int C = 0>
void mix_rows_of(int differences, std::int64_t length, const Scalar* const* rows, const double* weight, Ahead ahead,
                 Scalar* out) {
  if (differences == C) return mix_rows<Scalar, C, past_cache>(length, rows, weight, ahead, out);
  if constexpr (C < kMaxOlder) mix_rows_of<Scalar, past_cache, C + 1>(differences, length, rows, weight, ahead, out);
}

// A whole piece: whole lines where they lie, the rest through padded copies (zeros leave every sum unchanged).
// sums as `dots` above.
template <class Scalar, bool steps>
void measure_piece(std::int64_t length, int older, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows,
                   Ahead ahead, bool past_cache, double* sums) {
  constexpr int line = kLine<Scalar>;
  const std::int64_t whole = length / line * line;
  if (past_cache && is_aligned(rows.R[0]) && is_aligned(rows.F[0])) {
    measure_rows_of<Scalar, true, steps>(older, whole, f, z, rows, ahead, sums);
  } else {
    measure_rows_of<Scalar, false, steps>(older, whole, f, z, rows, ahead, sums);
  }
  if (whole == length) return;
  Scalar padded[2 * kMaxOlder + 4][line] = {};
  const std::size_t bytes = (length - whole) * sizeof(Scalar);
  RowsOf<Scalar> copies;
  Scalar(*next)[line] = padded;
  const auto copy_of = [&](const Scalar* row) {
    if (row) std::memcpy(*next, row + whole, bytes);
    return *next++;
  };
  const Scalar *f_copy = copy_of(f), *z_copy = copy_of(z);
  copies.R[0] = copy_of(nullptr);
  copies.F[0] = copy_of(nullptr);
  for (int a = 1; a <= older; ++a) {
    copies.R[a] = copy_of(rows.R[a]);
    if constexpr (steps) copies.F[a] = copy_of(rows.F[a]);
  }
  measure_rows_of<Scalar, false, steps>(older, line, f_copy, z_copy, copies, {}, sums);
  std::memcpy(rows.R[0] + whole, copies.R[0], bytes);
  std::memcpy(rows.F[0] + whole, copies.F[0], bytes);
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
