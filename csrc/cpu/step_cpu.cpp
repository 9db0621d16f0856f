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

template <class Scalar>
void measure(const Call& call) {
  const Batch<Scalar> b{call};
  const std::int64_t width = Dots::size(b.M);
  Buffer<double> partial(b.pieces > 1 ? b.blocks * b.pieces * width : 0);
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 3), call.threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto item) {
      if (b.pieces == 1) {
        measure_block(b, i, t, call.norms + 2 * item);
      } else if (b.is_wanted(i, t)) {
        measure_one(b, b.place(i, t), first, last, {}, Dots{b.M, partial.data + item * width});
      }
    });
    fence();
  });
  for (std::int64_t block = 0; b.pieces > 1 && block < b.blocks; ++block) {
    const Place at = b.place(block / b.T, block % b.T);
    if (!b.is_wanted(block / b.T, block % b.T)) {
      call.ring.count[at.at] = 0;
      continue;
    }
    const Dots dots{b.M, partial.data + block * b.pieces * width};
    for (std::int64_t p = 1; p < b.pieces; ++p) dots.add(Dots{b.M, dots.row + p * width});
    finish_block(b, at, dots, call.norms + 2 * block);
  }
}

template <class Scalar>
void weights(const Call& call) {
  const Batch<Scalar> b{call};
  parallel_for(call.n, b.blocks * b.M * b.M * 16, call.threads, [&](std::int64_t begin, std::int64_t end) {
    Systems systems(call.ring);
    std::int64_t samples[kLanes];
    for (std::int64_t i = begin; i < end; i += systems.group()) {
      const int k = static_cast<int>(end - i < systems.group() ? end - i : systems.group());
      for (int j = 0; j < k; ++j) samples[j] = b.sample(i + j);
      systems.solve(k, samples, call.mode + i * b.T, call.gamma + i * b.T * b.M, call.dropped + i * b.T);
    }
  });
}

template <class Scalar>
void mix(const Call& call) {
  const Batch<Scalar> b{call};
  parallel_for(b.blocks * b.pieces, b.bytes(b.M + 1), call.threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end, [&](auto i, auto t, auto first, auto last, auto) {
      const Place at = b.place(i, t);
      const std::int64_t block = i * b.T + t;
      mix_one(b, at, first, last, call.gamma + block * b.M, call.mode[block], b.F + b.row(at, 0), b.ahead(i, t, 1));
    });
    fence();
  });
}

// The passes one after the other, for samples whose rows fit in no core's cache.
template <class Scalar>
Counts step_by_passes(const Call& call) {
  const Batch<Scalar> b{call};
  Buffer<double> norms(2 * b.blocks), gamma(b.blocks * b.M);
  Buffer<std::int32_t> dropped(b.blocks);
  Call own = call;
  own.norms = norms.data, own.gamma = gamma.data, own.dropped = dropped.data;
  measure<Scalar>(own);
  const Counts counts = judge_samples(call.n, b.T, norms.data, nullptr, call.table, call.rule, call.mode);
  weights<Scalar>(own);
  for (std::int64_t i = 0; i < call.n; ++i) count_losses(call.table[i], b.T, dropped.data + i * b.T);
  mix<Scalar>(own);
  if (counts.left_behind == 0) return counts;
  parallel_for(b.blocks * b.pieces, b.bytes(2), call.threads, [&](std::int64_t begin, std::int64_t end) {
    for_pieces(b, begin, end,
               [&](auto i, auto t, auto first, auto last, auto) { keep_best(b, call.table[i], i, t, first, last); });
  });
  return counts;
}

template <class Scalar>
Counts step(const Call& call) {
  const Batch<Scalar> b{call};
  const std::int64_t T = b.T, M = b.M;
  const std::int64_t sample_bytes = 2 * M * T * b.D * static_cast<std::int64_t>(sizeof(Scalar));
  if (b.pieces > 1 || sample_bytes > kSample || sample_bytes == 0) return step_by_passes<Scalar>(call);
  std::atomic<std::int64_t> finished{0}, left_behind{0};
  parallel_for(call.n, b.bytes(2 * M + 3), call.threads, [&](std::int64_t begin, std::int64_t end) {
    Systems systems(call.ring);
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
        for (std::int64_t t = 0; t < T; ++t) measure_block(b, i + j, t, norms.data + 2 * (j * T + t));
      }
      std::uint8_t* const mode = call.mode + i * T;
      const Counts some = judge_samples(k, T, norms.data, nullptr, call.table + i, call.rule, mode);
      own.finished += some.finished;
      own.left_behind += some.left_behind;
      systems.solve(k, samples, mode, gamma.data, dropped.data);
      for (std::int64_t j = 0; j < k; ++j) {
        count_losses(call.table[i + j], T, dropped.data + j * T);
        for (std::int64_t t = 0; t < T; ++t) {
          keep_best(b, call.table[i + j], i + j, t, 0, b.D);
          const Place at = b.place(i + j, t);
          mix_one(b, at, 0, b.D, gamma.data + (j * T + t) * M, mode[j * T + t], b.f + at.state,
                  b.ahead(i + j, t, group));
        }
      }
    }
    finished += own.finished;
    left_behind += own.left_behind;
    fence();
  });
  return {finished, left_behind};
}

const char* measure_all(const Call& call) {
  with_scalar(call.ring.storage, [&](auto scalar) { measure<decltype(scalar)>(call); });
  return nullptr;
}
const char* weights_all(const Call& call) {
  with_scalar(call.ring.storage, [&](auto scalar) { weights<decltype(scalar)>(call); });
  return nullptr;
}
const char* mix_all(const Call& call) {
  with_scalar(call.ring.storage, [&](auto scalar) { mix<decltype(scalar)>(call); });
  return nullptr;
}
const char* advance_all(const Call& call) {
  Buffer<double> gamma(call.gamma ? 0 : call.n * call.ring.blocks * call.ring.slots);
  Call own = call;
  if (!own.gamma) own.gamma = gamma.data;
  weights_all(own);
  return mix_all(own);
}
Counts step_all(const Call& call) {
  Counts counts{0, 0};
  with_scalar(call.ring.storage, [&](auto scalar) { counts = step<decltype(scalar)>(call); });
  return counts;
}

}  // namespace

extern const Passes passes{measure_all, weights_all, mix_all, advance_all, step_all};

}  // namespace pydeqsolve::PYDEQSOLVE_ISA
