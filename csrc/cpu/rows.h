// The sums over rows: every row is read once, and everything it takes part in is accumulated in registers. Included by
// step_cpu.cpp alone, once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/loads.h"

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

// What rows are summed and mixed in: double, or float where they have 16 bits, whose differences it holds exactly or
// nearly so.
template <class Scalar>
constexpr bool kNarrow = sizeof(Scalar) == 2;
template <class Scalar>
using Number = std::conditional_t<kNarrow<Scalar>, Floats, Lanes>;

// Entries whose products are added up as Number before they join a sum in double; whole lines.
template <class Scalar>
constexpr std::int64_t kRun = kNarrow<Scalar> ? 512 : std::int64_t{1} << 50;

inline Lanes folded(const Lanes& v) { return v; }
inline Lanes folded(const Floats& v) { return lower(v) + upper(v); }
inline void add_square(Lanes& sum, const Lanes& v) { sum += v * v; }
inline void add_square(Lanes& sum, const FloatLanes& v) { add_square(sum, widen(v)); }
inline void add_square(Lanes& sum, const Floats& v) {
  add_square(sum, lower(v));
  add_square(sum, upper(v));
}

// Entries i … of a row of `length`, fewer than a line where it is a tail, else any number of lines; and their place.
template <bool tail, class Scalar>
inline WideLanes<Scalar> read_at(const Scalar* row, std::int64_t i, [[maybe_unused]] std::int64_t length, int part) {
  if constexpr (tail) {
    return load_some(row + i, static_cast<int>(length - i < kChunk<Scalar> ? length - i : kChunk<Scalar>));
  } else {
    return read(row + i, part);
  }
}
template <bool tail, class Scalar>
inline Stored<Scalar> stored_at(const Scalar* row, std::int64_t i, std::int64_t length) {
  if constexpr (tail) {
    return read_at<true>(row, i, length, 0);
  } else {
    return load(row + i);
  }
}
template <bool past_cache, bool tail, class Scalar>
inline void write_at(Scalar* row, std::int64_t i, [[maybe_unused]] std::int64_t length, const Stored<Scalar>& v) {
  if constexpr (tail) {
    write_some(row + i, static_cast<int>(length - i < kChunk<Scalar> ? length - i : kChunk<Scalar>), v);
  } else {
    write<past_cache>(row + i, v);
  }
}

// Writes R[0] = r, which is f - z as kept, and F[0] = f over `length` entries, whole lines or a tail. With differences
// by age y_a = r_a - r_{a+1} and steps s_a = z_a - z_{a+1}, z = f - r, adds
//   without steps: y_0.y_a, y_a.r;  with steps: s_a.y_0, s_a.r, s_0.y_a, s_0.s_a;  C of each, one kind after the other,
// and then |f - z|^2 and f.f, to dots. Rows of bfloat16 count `scale` times in all but the last two.
template <class Scalar, int C, bool past_cache, bool steps, bool tail>
void measure_rows(std::int64_t length, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows, Ahead ahead,
                  [[maybe_unused]] float scale, double* dots) {
  constexpr int kSums = steps ? 4 : 2;
  const auto number = [&](const WideLanes<Scalar>& v) -> Number<Scalar> {
    if constexpr (std::is_same_v<Scalar, BFloat16>) {
      return v * scale;
    } else {
      return converted<Number<Scalar>>(v);
    }
  };
  Lanes totals[kSums][C + 1], rr = {}, ff = {};
  const Scalar *R[C + 1], *F[C + 1];
#pragma GCC unroll 16
  for (int a = 0; a < C; ++a) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) totals[k][a] = Lanes{};
    R[a] = rows.R[a + 1];
    if constexpr (steps) F[a] = rows.F[a + 1];
  }
  Scalar *R0 = rows.R[0], *F0 = rows.F[0];
  for (std::int64_t run = 0; run < length; run += kRun<Scalar>) {
    const std::int64_t end = length - run < kRun<Scalar> ? length : run + kRun<Scalar>;
    Number<Scalar> sums[kSums][C + 1];
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) sums[k][a] = Number<Scalar>{};
    }
    for (std::int64_t line = run; line < end; line += kLine<Scalar>) {
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
        if (tail && i >= length) break;
        WideLanes<Scalar> exact[kParts<Scalar>];
#pragma GCC unroll 2
        for (int part = 0; part < kParts<Scalar>; ++part) {
          const WideLanes<Scalar> value = read_at<tail>(f, i, length, part);
          exact[part] = value - read_at<tail>(z, i, length, part);
          add_square(rr, exact[part]);
          add_square(ff, value);
        }
        const Stored<Scalar> r_row = joined_residuals<Scalar>(exact), f_row = stored_at<tail>(f, i, length);
        write_at<past_cache, tail>(R0, i, length, r_row);
        write_at<past_cache, tail>(F0, i, length, f_row);
#pragma GCC unroll 2
        for (int part = 0; part < kParts<Scalar>; ++part) {
          // Else both parts of a load would stay in registers, of which there are too few.
          if constexpr (kNarrow<Scalar>) __asm__ volatile("" ::: "memory");
          const Number<Scalar> r = number(expand<Scalar>(r_row, part)), value = number(expand<Scalar>(f_row, part));
          Number<Scalar> r_a = r, z_a = value - r, y_0 = {}, s_0 = {};
#pragma GCC unroll 16
          for (int a = 0; a < C; ++a) {
            const Number<Scalar> r_next = number(read_at<tail>(R[a], i, length, part)), y = r_a - r_next;
            if (a == 0) y_0 = y;
            r_a = r_next;
            if constexpr (steps) {
              const Number<Scalar> z_next = number(read_at<tail>(F[a], i, length, part)) - r_next, s = z_a - z_next;
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
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) totals[k][a] += folded(sums[k][a]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kSums; ++k) {
#pragma GCC unroll 16
    for (int a = 0; a < C; ++a) dots[k * C + a] += sum_lanes(totals[k][a]);
  }
  dots[kSums * C] += sum_lanes(rr);
  dots[kSums * C + 1] += sum_lanes(ff);
}

// The instances by number of differences C = 0 … most_older.
template <class Scalar, bool past_cache, bool steps, bool tail, int C = 0>
void measure_rows_of(int differences, std::int64_t length, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows,
                     Ahead ahead, float scale, double* dots) {
  if (differences == C) {
    return measure_rows<Scalar, C, past_cache, steps, tail>(length, f, z, rows, ahead, scale, dots);
  }
  if constexpr (C < most_older(steps)) {
    measure_rows_of<Scalar, past_cache, steps, tail, C + 1>(differences, length, f, z, rows, ahead, scale, dots);
  }
}

// Rows of bfloat16 reach further than the products of floats: they are taken times a power of two, about one over the
// size of the residual before, whose square this is. The scale goes with the problem, and so do all bits of the sums.
inline float scale_of(double squares) {
  std::uint64_t bits;
  std::memcpy(&bits, &squares, sizeof bits);
  const int size = (static_cast<int>(bits >> 52 & 0x7ff) - 1023) / 2;
  return float_of(static_cast<std::uint32_t>(127 - (size > 126 ? 126 : size < -126 ? -126 : size)) << 23);
}
// Takes the scale out of n sums of products; false where a product left the range of float all the same.
inline bool unscale(int n, double scale, double* sums) {
  bool finite = true;
  for (int k = 0; k < n; ++k) {
    finite = finite && sums[k] - sums[k] == 0;
    sums[k] /= scale * scale;
  }
  return finite;
}

// Whether a piece of `length` entries takes the row kernels. Where differences are about as many as entries, it takes
// more digits than float has to tell from their products which depend on others.
template <class Scalar>
constexpr bool is_long(std::int64_t length) {
  return !kNarrow<Scalar> || length >= 4 * kMaxOlder;
}

// A whole piece: whole lines, and the rest where it lies if parts of a load can be, else through padded copies (zeros
// leave every sum unchanged).
// sums as `dots` above; squares: of the residual before, where there are older rows. Returns false where the rows are
// written, but sums must be formed in double.
template <class Scalar, bool steps>
bool measure_piece(std::int64_t length, int older, const Scalar* f, const Scalar* z, const RowsOf<Scalar>& rows,
                   Ahead ahead, bool past_cache, double squares, double* sums) {
  constexpr int line = kLine<Scalar>;
  constexpr bool scaled = std::is_same_v<Scalar, BFloat16>;
  const float scale = scaled && older > 0 ? scale_of(squares) : 1.0f;
  const std::int64_t whole = length / line * line;
  if (whole == 0) {
  } else if (past_cache && is_aligned(rows.R[0]) && is_aligned(rows.F[0])) {
    measure_rows_of<Scalar, true, steps, false>(older, whole, f, z, rows, ahead, scale, sums);
  } else {
    measure_rows_of<Scalar, false, steps, false>(older, whole, f, z, rows, ahead, scale, sums);
  }
  if constexpr (kMasked<Scalar>) {
    if (whole == length) return true;
    RowsOf<Scalar> rest;
    for (int a = 0; a <= older; ++a) {
      rest.R[a] = rows.R[a] + whole;
      rest.F[a] = rows.F[a] + whole;
    }
    measure_rows_of<Scalar, false, steps, true>(older, length - whole, f + whole, z + whole, rest, {}, scale, sums);
    return true;
  } else if (whole != length) {
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
    measure_rows_of<Scalar, false, steps, false>(older, line, f_copy, z_copy, copies, {}, scale, sums);
    std::memcpy(rows.R[0] + whole, copies.R[0], bytes);
    std::memcpy(rows.F[0] + whole, copies.F[0], bytes);
  }
  return !scaled || unscale((steps ? 4 : 2) * older, scale, sums);
}

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
