// The small systems: summed over the blocks of a sample as the coupling says, and solved for the weights. Where every
// sample has one positive system, kLanes samples are solved side by side.
#pragma once
#include <cstdint>
#include <cstring>

#include "core.h"
#include "cpu/lanes.h"

namespace pydeqsolve::PYDEQSOLVE_ISA {
namespace {

// Workspace of one thread, reused from sample to sample.
class Systems {
 public:
  explicit Systems(const Ring& r)
      : ring(r), T(r.blocks), coupling_(T == 1 ? Coupling::kJoint : r.coupling), n(r.slots - 1) {}

  // How many samples `solve` takes at most.
  int group() const {
    return ring.kind == Kind::kAndersonII && coupling_ == Coupling::kJoint && n <= kSideBySide ? kLanes : 1;
  }

  // gamma (k, T, M), dropped (k, T) of `samples` (k,) from mode (k, T). Forgets the history of blocks that are
  // rejected, and all but the newest row of blocks that take a plain step.
  void solve(int k, const std::int64_t* samples, const std::uint8_t* mode, double* gamma, std::int32_t* dropped) {
    if (group() > 1) return solve_side_by_side(k, samples, mode, gamma, dropped);
    solve_one(samples[0], mode, gamma, dropped);
  }

 private:
  static constexpr int kMost = kMaxSlots - 1;
  static constexpr int kSideBySide = 16;  // differences

  // The sizes of the systems that the blocks of one sample (T,) ask for: the largest.
  int settle(std::int64_t sample, const std::uint8_t* mode) {
    int size = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      std::int32_t& count = ring.count[sample * T + t];
      if (mode[t] == kReject) count = 0;  // mix reads the counts of kMix blocks alone
      if (mode[t] == kPlain) count = 1;
      if (mode[t] == kMix && count - 1 > size) size = count - 1;
    }
    return size;
  }

  void solve_side_by_side(int k, const std::int64_t* samples, const std::uint8_t* mode, double* gamma,
                          std::int32_t* dropped) {
    int sizes[kLanes], most = 0;
    for (int lane = 0; lane < k; ++lane) {
      sizes[lane] = settle(samples[lane], mode + lane * T);
      most = sizes[lane] > most ? sizes[lane] : most;
    }
    for (int i = 0; i < most * most; ++i) A_lanes[i] = Lanes{};
    for (int i = 0; i < most; ++i) b_lanes[i] = Lanes{};
    Lanes rr{}, ff{};
    for (int lane = 0; lane < k; ++lane) {
      for (std::int64_t t = 0; t < T; ++t) {
        if (mode[lane * T + t] != kMix) continue;
        const std::int64_t block = samples[lane] * T + t;
        add_to_lane(block, lane, most);
        rr[lane] += ring.squares[2 * block];
        ff[lane] += ring.squares[2 * block + 1];
      }
    }
    const Lanes rank = solve_positive(most, A_lanes, b_lanes, scale_lanes, ring.ridge, kPivotCutoff, LanesRoot());
    const auto sound = is_sound(most, b_lanes, rr, ff, ring.eps);
    for (int lane = 0; lane < k; ++lane) {
      const int size = sizes[lane];
      for (std::int64_t t = 0; t < T; ++t) {
        const bool mixes = mode[lane * T + t] == kMix;
        dropped[lane * T + t] = !mixes ? 0 : sound[lane] ? size - static_cast<int>(rank[lane]) : size;
        double* const out = gamma + (lane * T + t) * ring.slots;
        for (int a = 0; mixes && a < ring.slots; ++a) out[a] = a < size && sound[lane] ? b_lanes[a][lane] : 0;
      }
    }
  }

  void add_to_lane(std::int64_t block, int lane, int stride) {
    const int M = ring.slots, size = ring.count[block] - 1;
    const double *gram = ring.gram + block * M * M, *rhs = ring.rhs + block * M;
    for (int i = 0, row = ring.head; i < size; ++i, row = row > 0 ? row - 1 : M - 1) {
      b_lanes[i][lane] += rhs[i];
      for (int j = 0, column = ring.head; j <= i; ++j, column = column > 0 ? column - 1 : M - 1) {
        A_lanes[i * stride + j][lane] += gram[row * M + column];
      }
    }
  }

  void solve_one(std::int64_t sample, const std::uint8_t* mode, double* gamma, std::int32_t* dropped) {
    settle(sample, mode);
    std::int64_t first = -1;
    int size = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      dropped[t] = 0;
      if (mode[t] != kMix) continue;
      if (first < 0 || coupling_ == Coupling::kIndependent) restart();
      if (first < 0) first = t;
      add(sample * T + t);
      const int differences = ring.count[sample * T + t] > 1 ? ring.count[sample * T + t] - 1 : 0;
      size = differences > size ? differences : size;
      if (coupling_ != Coupling::kJoint) dropped[t] = weights(differences, gamma + t * ring.slots);
    }
    if (coupling_ != Coupling::kJoint || first < 0) return;
    dropped[first] = weights(size, gamma + first * ring.slots);
    for (std::int64_t t = first + 1; t < T; ++t) {
      if (mode[t] != kMix) continue;
      std::memcpy(gamma + t * ring.slots, gamma + first * ring.slots, ring.slots * sizeof(double));
      dropped[t] = dropped[first];
    }
  }

  void restart() {
    std::memset(sum, 0, n * n * sizeof(double));
    std::memset(sum_rhs, 0, n * sizeof(double));
    squares[0] = squares[1] = 0;
  }

  void add(std::int64_t block) {
    const int M = ring.slots;
    add_block(n, ring.count[block] - 1, ring.head, M, ring.kind, ring.gram + block * M * M,
              ring.steps_gram ? ring.steps_gram + block * M * M : nullptr, ring.rhs + block * M, sum, sum_rhs);
    squares[0] += ring.squares[2 * block];
    squares[1] += ring.squares[2 * block + 1];
  }

  // The leading `size` weights of the sum so far, the rest zero; returns how many differences were left out.
  int weights(int size, double* gamma) {
    for (int i = 0; i < size; ++i) {
      gamma[i] = sum_rhs[i];
      for (int j = 0; j < size; ++j) A[i * size + j] = sum[i * n + j];
    }
    for (int a = size; a < ring.slots; ++a) gamma[a] = 0;
    return solve_system(ring.kind, size, A, gamma, scale, order, ring.ridge, squares, ring.eps);
  }

  const Ring& ring;
  const std::int64_t T;
  const Coupling coupling_;
  const int n;  // differences there can be
  double sum[kMost * kMost], sum_rhs[kMost], A[kMost * kMost], scale[kMost], squares[2];
  int order[kMost];
  Lanes A_lanes[kSideBySide * kSideBySide], b_lanes[kSideBySide], scale_lanes[kSideBySide];
};

}  // namespace
}  // namespace pydeqsolve::PYDEQSOLVE_ISA
