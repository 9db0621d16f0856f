// The next iterate from rows of values, each read once. Included by step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/rows.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

// out = F_0 - sum_a weight[a] (F_a - F_{a+1}) over `length` entries, whole lines or a tail; rows[0] is F_0. In float
// where rows have 16 bits: what that rounds off is 2^-13 and less of what the weights make of the rounding of F.
template <class Scalar, int C, bool past_cache, bool tail>
void mix_rows(std::int64_t length, const Scalar* const* rows, const double* weight, Ahead ahead, Scalar* out) {
  Number<Scalar> w[C + 1];
  const Scalar* F[C + 1];
  F[0] = rows[0];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) w[a] = all<Number<Scalar>>(weight[a]), F[a + 1] = rows[a + 1];
  for (std::int64_t line = 0; line < length; line += kLine<Scalar>) {
    if (ahead.history != 0) {
#pragma GCC unroll 16
      for (int a = 0; a < C; ++a) fetch(F[a + 1] + ahead.history + line);
    }
#pragma GCC unroll 8
    for (std::int64_t i = line; i < line + kLine<Scalar>; i += kChunk<Scalar>) {
      if (tail && i >= length) break;
      WideLanes<Scalar> out_parts[kParts<Scalar>];
#pragma GCC unroll 2
      for (int part = 0; part < kParts<Scalar>; ++part) {
        Number<Scalar> newer = converted<Number<Scalar>>(read_at<tail>(F[0], i, length, part)), x = newer;
#pragma GCC unroll 16
        for (int a = 0; a < C; ++a) {
          const Number<Scalar> next = converted<Number<Scalar>>(read_at<tail>(F[a + 1], i, length, part));
          x -= w[a] * (newer - next);
          newer = next;
        }
        out_parts[part] = converted<WideLanes<Scalar>>(x);
      }
      write_at<past_cache, tail>(out, i, length, joined<Scalar>(out_parts));
    }
  }
}

// The instances by number of differences C = 0 … kMaxOlder.
template <class Scalar, bool past_cache, bool tail, int C = 0>
void mix_rows_of(int differences, std::int64_t length, const Scalar* const* rows, const double* weight, Ahead ahead,
                 Scalar* out) {
  if (differences == C) return mix_rows<Scalar, C, past_cache, tail>(length, rows, weight, ahead, out);
  if constexpr (C < kMaxOlder)
    mix_rows_of<Scalar, past_cache, tail, C + 1>(differences, length, rows, weight, ahead, out);
}

// Points the rows that only weights of zero would take past themselves, to the next one that is used, and returns how
// many differences are left: 0 times infinity is NaN.
template <class Scalar>
int leave_out_unused(int differences, const double* weight, const Scalar** rows) {
  while (differences > 0 && weight[differences - 1] == 0) --differences;
  for (int a = differences - 1; a > 0; --a) {
    if (weight[a - 1] == 0 && weight[a] == 0) rows[a] = rows[a + 1];
  }
  return differences;
}

// Changes `rows` where one is not used or a copy is needed.
template <class Scalar>
void mix_piece(std::int64_t length, int differences, Ahead ahead, bool past_cache, const Scalar** rows,
               const double* weight, Scalar* out) {
  differences = leave_out_unused(differences, weight, rows);
  constexpr int line = kLine<Scalar>;
  const std::int64_t whole = length / line * line;
  if (whole == 0) {
  } else if (past_cache && is_aligned(out)) {
    mix_rows_of<Scalar, true, false>(differences, whole, rows, weight, ahead, out);
  } else {
    mix_rows_of<Scalar, false, false>(differences, whole, rows, weight, ahead, out);
  }
  if (whole == length) return;
  if constexpr (kMasked<Scalar>) {
    for (int a = 0; a <= differences; ++a) rows[a] += whole;
    return mix_rows_of<Scalar, false, true>(differences, length - whole, rows, weight, {}, out + whole);
  }
  Scalar padded[kMaxOlder + 2][line] = {};
  const std::size_t bytes = (length - whole) * sizeof(Scalar);
  for (int a = 0; a <= differences; ++a) {
    std::memcpy(padded[a], rows[a] + whole, bytes);
    rows[a] = padded[a];
  }
  mix_rows_of<Scalar, false, false>(differences, line, rows, weight, {}, padded[kMaxOlder + 1]);
  std::memcpy(out + whole, padded[kMaxOlder + 1], bytes);
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
