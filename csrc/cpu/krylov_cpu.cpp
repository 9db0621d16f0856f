// The passes of the adjoint's Krylov solve on the CPU. Compiled once per instruction set, as step_cpu.cpp is. Sums are
// formed in double: lanes of a piece, pieces of a sample, always in that order.
#ifndef PYDEQSOLVE_ISA
#define PYDEQSOLVE_ISA portable
#endif

#include "cpu/krylov_stages.h"
#include "hessenberg.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

template <class Scalar, class Claim>
std::int64_t count_of(const Krylov<Scalar>& c, const Claim& claim) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < c.B; ++i) count += claim(c.samples[i]);
  return count;
}

template <class Scalar>
void fill(Scalar* p, std::int64_t first, std::int64_t last, Scalar value) {
  for (std::int64_t e = first; e < last; ++e) p[e] = value;
}

template <class Scalar>
std::int64_t begin(const Krylov<Scalar>& c, const std::uint8_t* mask, const KrylovTolerance& asked, Scalar* q0,
                   int threads) {
  for_samples(
      shape_of(c, 3, threads), Stages{{2, 1, 0}, true}, 0,
      [&](int s, std::int64_t i, std::int64_t first, std::int64_t last, const double* totals, double* own, Sums&) {
        const Scalar* const g = c.g + i * c.N;
        if (mask && !mask[i]) return;
        if (s == 0) {
          double most = 0, bad = 0;
          for (std::int64_t e = first; e < last; ++e) {
            const double x = std::fabs(static_cast<double>(g[e]));
            bad = x < INFINITY ? bad : 1;
            most = x > most ? x : most;
          }
          own[0] = most, own[1] = bad;
        } else if (totals[1] == 0) {
          const Power down(-exponent_of(totals[0]));
          double squares = 0;
          for (std::int64_t e = first; e < last; ++e) {
            const double x = static_cast<Scalar>(down(static_cast<double>(g[e])));
            squares += x * x;
          }
          own[0] = squares;
        }
      },
      [&](std::int64_t i, const double* totals) {
        KrylovSample& s = c.samples[i];
        s = system_of(mask && !mask[i], totals[0], totals[1] != 0, totals[2], asked, i);
        start_cycle(s, s.best);
      },
      [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        const KrylovSample& s = c.samples[i];
        Scalar* const q = q0 + i * c.N;
        if (!s.active) return fill(q, first, last, Scalar{0});
        const Power down(-s.exponent);
        for (std::int64_t e = first; e < last; ++e) {
          q[e] = static_cast<Scalar>(static_cast<Scalar>(down(static_cast<double>(c.g[i * c.N + e]))) / s.norm);
        }
      });
  return count_of(c, [](const KrylovSample& s) { return s.active; });
}

template <class Scalar>
std::int64_t append(const Krylov<Scalar>& c, int k, const Scalar* product, Scalar* next, int threads) {
  const int vectors = k + 1;
  for_samples(
      shape_of(c, 3 * vectors + 4, threads), Stages{{vectors, vectors + 1, 1}}, vectors,
      [&](int s, std::int64_t i, std::int64_t first, std::int64_t last, const double* totals, double* own, Sums& sums) {
        if (!c.samples[i].going) return;
        const std::int64_t row = i * c.N;
        Scalar* const w = next + row;
        if (s == 2) {
          const double* const h = totals + vectors;
          if (is_rounding(vectors, h, h[vectors], c.eps)) return;  // nothing to subtract: w stays
          own[0] = subtract<false>(vectors, c.vectors, row, first, last, h, w, sums);
          return;
        }
        sums.clear();
        if (s == 0) {
          const Scalar *const q = c.vectors[k] + row, *const p = product + row;
          for (std::int64_t e = first; e < last; ++e) w[e] = q[e] - p[e];
          dot(vectors, c.vectors, row, first, last, w, sums);
        } else {
          own[vectors] = subtract<true>(vectors, c.vectors, row, first, last, totals, w, sums);
        }
        sums.write(own);
      },
      [&](std::int64_t i, double* totals) {
        KrylovSample& s = c.samples[i];
        if (!s.going) return;
        const auto rotation = [&](int j) { return column_of(c.columns, i, j) + j + 1; };
        const double* const again = totals + vectors;
        take_components(s, rotation, column_of(c.columns, i, k), k, totals, again, again[vectors], again[vectors + 1],
                        c.eps);
      },
      [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        const KrylovSample& s = c.samples[i];
        Scalar* const w = next + i * c.N;
        if (!s.going) return fill(w, first, last, Scalar{0});
        const double inverse = 1 / s.below;
        for (std::int64_t e = first; e < last; ++e) w[e] = static_cast<Scalar>(w[e] * inverse);
      });
  return count_of(c, [](const KrylovSample& s) { return s.going; });
}

template <class Scalar>
std::int64_t combine(const Krylov<Scalar>& c, bool cautious, const Scalar* u, Scalar* out, int threads) {
  int most = 0;
  for (std::int64_t i = 0; i < c.B; ++i) most = c.samples[i].taken > most ? c.samples[i].taken : most;
  const Shape shape = shape_of(c, most + 2, threads);
  if (!cautious) {
    parallel_for(c.B, c.B * most * most * 8, threads, [&](std::int64_t begin, std::int64_t end) {
      Scratch y(most);
      for (std::int64_t i = begin; i < end; ++i) leave_out_weak(c.samples[i], c.columns, i, c.eps, y.data);
    });
  }
  const std::int64_t pieces = shape.pieces();
  parallel_for(shape.B * pieces, shape.bytes, shape.threads, [&](std::int64_t begin, std::int64_t end) {
    Scratch y(most);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t i = item / pieces, first = item % pieces * kLong;
      const std::int64_t last = pieces == 1 || first + kLong > c.N ? c.N : first + kLong, row = i * c.N;
      const KrylovSample& s = c.samples[i];
      const int count = cautious ? s.sound : s.taken;
      if (s.broken) {
        fill(out + row, first, last, static_cast<Scalar>(NAN));
        continue;
      }
      coordinates(c.columns, i, count, y.data);
      combined(count, c.vectors, row, first, last, y.data, u ? u + row : nullptr, out + row);
    }
  });
  return count_of(c, [](const KrylovSample& s) { return s.active && s.sound < s.taken; });
}

// |g + A u - u|^2 and |u|^2 over some entries, to own.
template <class Scalar>
void measure(const Krylov<Scalar>& c, std::int64_t i, std::int64_t first, std::int64_t last, const Scalar* u,
             const Scalar* product, double* own) {
  const Power down(-c.samples[i].exponent);
  double squares = 0, length = 0;
  for (std::int64_t e = i * c.N + first; e < i * c.N + last; ++e) {
    const double x = u[e], g = static_cast<Scalar>(down(static_cast<double>(c.g[e]))), r = g + product[e] - x;
    squares += r * r, length += x * x;
  }
  own[0] = squares, own[1] = length;
}

template <class Scalar>
std::int64_t accept(const Krylov<Scalar>& c, const Scalar* u1, const Scalar* product1, const Scalar* u2,
                    const Scalar* product2, Scalar* u, Scalar* q0, int threads) {
  for_samples(
      shape_of(c, u2 ? 8 : 6, threads), Stages{{u2 ? 4 : 2, 0, 0}}, 0,
      [&](int, std::int64_t i, std::int64_t first, std::int64_t last, const double*, double* own, Sums&) {
        if (!c.samples[i].active) return;
        measure(c, i, first, last, u1, product1, own);
        if (u2) measure(c, i, first, last, u2, product2, own + 2);
      },
      [&](std::int64_t i, const double* totals) { accept_sample(c.samples[i], totals, u2 != nullptr, c.eps); },
      [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        const KrylovSample& s = c.samples[i];
        const std::int64_t row = i * c.N;
        const Scalar *const taken = s.chosen == 2 ? u2 : u1, *const product = s.chosen == 2 ? product2 : product1;
        if (s.active) {
          const Power down(-s.exponent);
          for (std::int64_t e = row + first; e < row + last; ++e) {
            const double g = static_cast<Scalar>(down(static_cast<double>(c.g[e])));
            q0[e] = static_cast<Scalar>((g + product[e] - taken[e]) / s.left);
          }
        } else {
          fill(q0 + row, first, last, Scalar{0});
        }
        if (s.chosen > 0 && taken != u) {
          for (std::int64_t e = row + first; e < row + last; ++e) u[e] = taken[e];
        } else if (s.chosen == 0 && u == u1) {
          fill(u + row, first, last, Scalar{0});
        }
      });
  return count_of(c, [](const KrylovSample& s) { return s.active; });
}

template <class Scalar>
std::int64_t raise(const Krylov<Scalar>& c, Scalar* u, int threads) {
  for_samples(
      shape_of(c, 2, threads), Stages{{1, 0, 0}}, 0,
      [&](int, std::int64_t i, std::int64_t first, std::int64_t last, const double*, double* own, Sums&) {
        const Power up(c.samples[i].exponent), down(-c.samples[i].exponent);
        for (std::int64_t e = i * c.N + first; e < i * c.N + last; ++e) {
          const Scalar before = u[e];
          u[e] = static_cast<Scalar>(up(static_cast<double>(before)));
          own[0] += static_cast<Scalar>(down(static_cast<double>(u[e]))) != before;
        }
      },
      [&](std::int64_t i, const double* totals) { raise_sample(c.samples[i], totals[0]); },
      [](std::int64_t, std::int64_t, std::int64_t) {});
  return count_of(c, [](const KrylovSample& s) { return s.changed; });
}

template <class Scalar>
std::int64_t lower(const Krylov<Scalar>& c, Scalar* values, const Scalar* raised, int threads) {
  for_samples(
      shape_of(c, 3, threads), Stages{{2, 0, 0}}, 0,
      [&](int, std::int64_t i, std::int64_t first, std::int64_t last, const double*, double* own, Sums&) {
        for (std::int64_t e = i * c.N + first; e < i * c.N + last; ++e) {
          own[0] += !(std::fabs(static_cast<double>(values[e])) < INFINITY);
          own[1] += raised && values[e] != raised[e];
        }
      },
      [&](std::int64_t i, const double* totals) { lower_sample(c.samples[i], totals[0], totals[1]); },
      [&](std::int64_t i, std::int64_t first, std::int64_t last) {
        const Power down(-c.samples[i].exponent);
        for (std::int64_t e = i * c.N + first; e < i * c.N + last; ++e) {
          values[e] = c.samples[i].chosen ? static_cast<Scalar>(down(static_cast<double>(values[e]))) : Scalar{0};
        }
      });
  return count_of(c, [](const KrylovSample& s) { return s.changed; });
}

template <class Scalar>
void remeasure(const Krylov<Scalar>& c, const Scalar* u, const Scalar* product, int threads) {
  for_samples(
      shape_of(c, 3, threads), Stages{{2, 0, 0}}, 0,
      [&](int, std::int64_t i, std::int64_t first, std::int64_t last, const double*, double* own, Sums&) {
        measure(c, i, first, last, u, product, own);
      },
      [&](std::int64_t i, const double* totals) {
        KrylovSample& s = c.samples[i];
        if (s.changed && s.best < INFINITY) s.best = std::sqrt(totals[0]);
      },
      [](std::int64_t, std::int64_t, std::int64_t) {});
}

template <class Scalar>
void scale(const Krylov<Scalar>& c, Scalar* out, int threads) {
  for_pieces(shape_of(c, 2, threads), [&](std::int64_t i, std::int64_t first, std::int64_t last, std::int64_t) {
    const KrylovSample& s = c.samples[i];
    const std::int64_t row = i * c.N;
    if (s.out || s.lost) return fill(out + row, first, last, Scalar{0});
    const Power down(-s.exponent);
    for (std::int64_t e = row + first; e < row + last; ++e) {
      out[e] = static_cast<Scalar>(down(static_cast<double>(c.g[e])));
    }
  });
}

template <class Scalar>
void settle(const Krylov<Scalar>& c, const Scalar* u, const Scalar* product, const KrylovTold& told, int threads) {
  for_samples(
      shape_of(c, product ? 3 : 1, threads), Stages{{2, 0, 0}}, 0,
      [&](int, std::int64_t i, std::int64_t first, std::int64_t last, const double*, double* own, Sums&) {
        if (c.samples[i].out || c.samples[i].lost) return;
        if (product) return measure(c, i, first, last, u, product, own);
        double length = 0;
        for (std::int64_t e = i * c.N + first; e < i * c.N + last; ++e) {
          length += static_cast<double>(u[e]) * static_cast<double>(u[e]);
        }
        own[1] = length;
      },
      [&](std::int64_t i, const double* totals) { settle_sample(c.samples[i], totals, told, i, c.eps); },
      [](std::int64_t, std::int64_t, std::int64_t) {});
}

}  // namespace

template <class Scalar>
const KrylovPasses<Scalar>& krylov_passes() {
  static constexpr KrylovPasses<Scalar> passes{begin<Scalar>,     append<Scalar>, combine<Scalar>,
                                               accept<Scalar>,    raise<Scalar>,  lower<Scalar>,
                                               remeasure<Scalar>, scale<Scalar>,  settle<Scalar>};
  return passes;
}
template const KrylovPasses<float>& krylov_passes<float>();
template const KrylovPasses<double>& krylov_passes<double>();

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
