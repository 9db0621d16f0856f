// Sums over the threads of a team, in an order that the number of features alone decides.
#pragma once
#include "cuda/packs.cuh"

namespace pydeqsolve {
namespace {

// Adds every entry of `values` over the lanes of a warp by recursive halving: a lane hands half of its values to its
// partner and adds the partner's other half, so K values take about K exchanges, not 5 K. What a lane ends up with
// goes to out[first], out[first + 1], …, `count` of them.
template <int kValues, int kDistance = kWarp / 2>
__device__ inline void add_over_warp(const double (&values)[kValues], int lane, double* out, int first = 0,
                                     int count = kValues) {
  constexpr int kHalf = (kValues + 1) / 2;
  const bool upper = (lane & kDistance) != 0;
  double sums[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double low = values[i], high = i + kHalf < kValues ? values[i + kHalf < kValues ? i + kHalf : 0] : 0;
    sums[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kDistance);
  }
  first += upper ? kHalf : 0;
  count = upper ? count - kHalf : count < kHalf ? count : kHalf;
  if constexpr (kDistance > 1) {
    add_over_warp<kHalf, kDistance / 2>(sums, lane, out, first, count);
  } else {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      if (i < count) out[first + i] = sums[i];
    }
  }
}

__device__ inline double larger(double a, double b) { return a > b ? a : b; }

__device__ inline double max_over_warp(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sums of one block or piece: `dots` for each age, then the squares of r and f, then their largest entries.
// dots: w_a . y_0 and w_a . r_0; with steps also s_0 . y_a and s_0 . s_a.
template <bool kSteps>
struct Sums {
  static constexpr int kDots = kSteps ? 4 : 2;
  int slots;
  double* row;

  __host__ __device__ static int size(int slots) { return kDots * slots + 4; }
  __device__ double& dot(int age, int which) const { return row[kDots * age + which]; }
  __device__ double& squares(int which) const { return row[kDots * slots + which]; }
  __device__ double& largest(int which) const { return row[kDots * slots + 2 + which]; }
  __device__ bool is_largest(int v) const { return v >= kDots * slots + 2; }
  __device__ bool formed(int v, int older, Norm norm) const {  // else entry v of row has no value
    return v < kDots * older || (v >= kDots * slots && (norm == Norm::kMax || !is_largest(v)));
  }
};

// What a thread has summed over its packs: the dots of kAges ages, then the squares of r and f.
template <int kAges, bool kSteps>
struct Partial {
  static constexpr int kDots = Sums<kSteps>::kDots;
  static constexpr int kValues = kDots * kAges + 2;
  double values[kValues];
  double largest[2];

  // Of f and of r = f - z before it is rounded to be kept.
  template <class Scalar>
  __device__ void add_squares(const Pack<Scalar>& f, const Pack<Scalar>& z, Norm norm) {
#pragma unroll 1
    for (int part = 0; part < Pack<Scalar>::kParts; ++part) {
#pragma unroll
      for (int k = 0; k < Pack<Scalar>::kPart; ++k) {
        const Wide<Scalar> value = f.value(part, k), difference = value - z.value(part, k);
        const double of_r = difference, of_f = value;
        values[kDots * kAges] = fma(of_r, of_r, values[kDots * kAges]);
        values[kDots * kAges + 1] = fma(of_f, of_f, values[kDots * kAges + 1]);
        if (norm == Norm::kMax) {
          largest[0] = larger(largest[0], magnitude(of_r));
          largest[1] = larger(largest[1], magnitude(of_f));
        }
      }
    }
  }
};

// Adds the partial sums of a team's threads into `sums`. parts is shared workspace of kValues doubles per warp.
template <int kAges, bool kSteps>
__device__ inline void add_over_team(const Team& team, const Partial<kAges, kSteps>& mine, Norm norm, int first,
                                     int ages, double* parts, const Sums<kSteps>& sums) {
  using Mine = Partial<kAges, kSteps>;
  const int warps = team.size / kWarp, warp = team.rank / kWarp, lane = team.rank % kWarp;
  add_over_warp(mine.values, lane, parts + warp * Mine::kValues);
  team.sync();
  for (int v = team.rank; v < Mine::kValues; v += team.size) {
    double sum = parts[v];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) sum += parts[w * Mine::kValues + v];
    const int age = v / Mine::kDots, square = v - Mine::kDots * kAges;
    if (age < ages && square < 0) sums.dot(first + age, v % Mine::kDots) = sum;
    if (square >= 0 && first == 0) sums.squares(square) = sum;
  }
  team.sync();
  if (first == 0 && norm == Norm::kMax) {
    const double of_r = max_over_warp(mine.largest[0]), of_f = max_over_warp(mine.largest[1]);
    if (lane < 2) parts[2 * warp + lane] = lane == 0 ? of_r : of_f;
    team.sync();
    if (team.rank < 2) {
      double most = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) most = larger(most, parts[2 * w + team.rank]);
      sums.largest(team.rank) = most;
    }
    team.sync();
  }
}

}  // namespace
}  // namespace pydeqsolve
