// The CPU step. This file is compiled once per instruction set (PYDEQSOLVE_ISA names the namespace); dispatch.cpp
// chooses at run time. Everything here has internal linkage or lies in that namespace, so that the linker cannot
// replace a function of the portable build by its AVX-512 twin.
//
// Sums are formed in double (rows.h: short runs of 16 bits in float): lanes of a line or tile, lines of a piece, pieces
// of a block, always in that order, so the bits depend on the instruction set but never on the number of threads or on
// the other samples.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef PYDEQSOLVE_ISA
#define PYDEQSOLVE_ISA portable
#endif

#include "cpu/batch.h"
#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "judge.h"
#include "step.h"
#include "systems.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

constexpr std::int64_t kSample =
    1 << 18;  // bytes of rows of a sample that stay in a core's own cache from pass to pass

template <class T>
struct Buffer {  // zeroed
  explicit Buffer(std::int64_t n) : data(static_cast<T*>(std::calloc(n > 0 ? n : 1, sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data;
};

}  // namespace

template <class Scalar>
void measure(const Rows& rows, const History<Scalar>& h, const Scalar* f, const Scalar* z, double* norms, Norm norm,
             int threads) {
  const Batch<Scalar> b{rows, h};
  const std::int64_t width = Dots::size(b.M);
  Buffer<double> partial(b.pieces > 1 ? b.blocks * b.pieces * width : 0);
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 3), threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto item) {
      if (b.pieces == 1) {
        measure_block(b, i, t, f, z, norm, norms + 2 * item);
      } else if (b.is_wanted(i, t)) {
        measure_one(b, b.block(i, t), first, last, f, z, norm, {}, Dots{b.M, partial.data + item * width});
      }
    });
    fence();
  });
  for (std::int64_t block = 0; b.pieces > 1 && block < b.blocks; ++block) {
    const Block at = b.block(block / b.T, block % b.T);
    if (!b.is_wanted(block / b.T, block % b.T)) {
      h.count[at.at] = 0;
      continue;
    }
    const Dots dots{b.M, partial.data + block * b.pieces * width};
    for (std::int64_t p = 1; p < b.pieces; ++p) dots.add(Dots{b.M, dots.row + p * width});
    finish_block(b, at, dots, norm, norms + 2 * block);
  }
}

template <class Scalar>
void weights(const Rows& rows, const History<Scalar>& h, Coupling coupling, double ridge, const std::uint8_t* mode,
             double* gamma, std::int32_t* dropped, int threads) {
  const Batch<Scalar> b{rows, h};
  parallel_for(rows.n, b.blocks * b.M * b.M * 16, threads, [&](std::int64_t begin, std::int64_t end) {
    Systems<Scalar> systems(h, coupling, ridge, b.T);
    std::int64_t samples[kLanes];
    for (std::int64_t i = begin; i < end; i += systems.group()) {
      const int k = static_cast<int>(end - i < systems.group() ? end - i : systems.group());
      for (int j = 0; j < k; ++j) samples[j] = b.sample(i + j);
      systems.solve(k, samples, mode + i * b.T, gamma + i * b.T * b.M, dropped + i * b.T);
    }
  });
}

template <class Scalar>
void mix(const Rows& rows, const History<Scalar>& h, const double* gamma, const std::uint8_t* mode, double beta,
         const Scalar* z, Scalar* z_next, int threads) {
  const Batch<Scalar> b{rows, h};
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 1), threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto) {
      const Block at = b.block(i, t);
      const std::int64_t block = i * b.T + t;
      mix_one(b, at, first, last, gamma + block * b.M, mode[block], beta, h.F + b.row(at, 0), b.ahead(i, t, 1), z,
              z_next);
    });
    fence();
  });
}

template <class Scalar>
Counts step(const Rows& rows, const History<Scalar>& h, const Scalar* f, const Scalar* z, const Judgement& rule,
            Record* table, const Update& update, std::uint8_t* mode, Scalar* z_next, int threads) {
  const Batch<Scalar> b{rows, h};
  const Norm norm = rule.is_max ? Norm::kMax : Norm::kSquares;
  const std::int64_t T = b.T, M = b.M;
  const std::int64_t sample_bytes = 2 * M * T * b.D * static_cast<std::int64_t>(sizeof(Scalar));
  if (b.pieces > 1 || sample_bytes > kSample || sample_bytes == 0) {
    Buffer<double> norms(2 * b.blocks), gamma(b.blocks * M);
    Buffer<std::int32_t> dropped(b.blocks);
    measure<Scalar>(rows, h, f, z, norms.data, norm, threads);
    const Counts counts = judge_all(rows.n, T, norms.data, nullptr, table, rule, mode);
    weights<Scalar>(rows, h, update.coupling, update.ridge, mode, gamma.data, dropped.data, threads);
    for (std::int64_t i = 0; i < rows.n; ++i) count_losses(table[i], T, dropped.data + i * T);
    mix<Scalar>(rows, h, gamma.data, mode, update.beta, z, z_next, threads);
    if (counts.left_behind == 0) return counts;
    parallel_for(b.blocks * b.pieces, b.bytes(2), threads, [&](std::int64_t begin, std::int64_t end) {
      for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto) {
        keep_best(b, table[i], update, i, t, first, last);
      });
    });
    return counts;
  }
  std::atomic<std::int64_t> finished{0}, left_behind{0};
  parallel_for(rows.n, b.bytes(2 * M + 3), threads, [&](std::int64_t begin, std::int64_t end) {
    Systems<Scalar> systems(h, update.coupling, update.ridge, T);
    const std::int64_t fit = kSample / sample_bytes, group = fit < systems.group() ? fit : systems.group();
    Buffer<double> norms(2 * group * T), gamma(group * T * M);
    Buffer<std::int32_t> dropped(group * T);
    std::int64_t samples[kLanes];
    Counts own{0, 0};
    for (std::int64_t i = begin; i < end; i += group) {
      const int k = static_cast<int>(end - i < group ? end - i : group);
      std::memset(norms.data, 0, 2 * k * T * sizeof(double));
      for (std::int64_t j = 0; j < k; ++j) {
        samples[j] = b.sample(i + j);
        for (std::int64_t t = 0; t < T; ++t) measure_block(b, i + j, t, f, z, norm, norms.data + 2 * (j * T + t));
      }
      const Counts some = judge_all(k, T, norms.data, nullptr, table + i, rule, mode + i * T);
      own.finished += some.finished;
      own.left_behind += some.left_behind;
      systems.solve(k, samples, mode + i * T, gamma.data, dropped.data);
      for (std::int64_t j = 0; j < k; ++j) {
        count_losses(table[i + j], T, dropped.data + j * T);
        for (std::int64_t t = 0; t < T; ++t) {
          keep_best(b, table[i + j], update, i + j, t, 0, b.D);
          const Block at = b.block(i + j, t);
          mix_one(b, at, 0, b.D, gamma.data + (j * T + t) * M, mode[(i + j) * T + t], update.beta, f + at.state,
                  b.ahead(i + j, t, group), z, z_next);
        }
      }
    }
    finished += own.finished;
    left_behind += own.left_behind;
    fence();
  });
  return {finished, left_behind};
}

#define PYDEQSOLVE_INSTANTIATE(Scalar)                                                                               \
  template void measure<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, double*, Norm,    \
                                int);                                                                                \
  template void weights<Scalar>(const Rows&, const History<Scalar>&, Coupling, double, const std::uint8_t*, double*, \
                                std::int32_t*, int);                                                                 \
  template void mix<Scalar>(const Rows&, const History<Scalar>&, const double*, const std::uint8_t*, double,         \
                            const Scalar*, Scalar*, int);                                                            \
  template Counts step<Scalar>(const Rows&, const History<Scalar>&, const Scalar*, const Scalar*, const Judgement&,  \
                               Record*, const Update&, std::uint8_t*, Scalar*, int);
PYDEQSOLVE_INSTANTIATE(float)
PYDEQSOLVE_INSTANTIATE(double)
PYDEQSOLVE_INSTANTIATE(BFloat16)
PYDEQSOLVE_INSTANTIATE(Half)

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
