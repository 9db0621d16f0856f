// How a thread reads and writes rows: 16 bytes at a time, at the places that a ring has them.
#pragma once
#include "pieces.cuh"

namespace pydeqsolve {
namespace {

// 16 bytes of consecutive features: what one thread takes at a time.
template <class Scalar>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(Scalar));
  Scalar v[kSize];
};

// The `length` features from p on, zeros after them: those change no sum. One load where rows are aligned.
template <bool kVector, class Scalar>
__device__ inline Pack<Scalar> load(const Scalar* p, int length) {
  Pack<Scalar> pack;
  if constexpr (kVector) {
    pack = *reinterpret_cast<const Pack<Scalar>*>(p);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) pack.v[k] = k < length ? p[k] : Scalar(0);
  }
  return pack;
}

template <bool kVector, class Scalar>
__device__ inline void store(Scalar* p, int length, const Pack<Scalar>& pack) {
  if constexpr (kVector) {
    *reinterpret_cast<Pack<Scalar>*>(p) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) {
      if (k < length) p[k] = pack.v[k];
    }
  }
}

// Calls body(at, length) for every pack of the piece that is this thread's.
template <class Scalar, class Body>
__device__ inline void for_each_pack(const Team& team, const Piece& piece, const Body& body) {
  constexpr int kSize = Pack<Scalar>::kSize;
  for (std::int64_t at = piece.begin + team.rank * kSize; at < piece.end; at += team.size * kSize) {
    body(at, piece.end - at < kSize ? static_cast<int>(piece.end - at) : kSize);
  }
}

// Where the row of each age starts in R and F, for one block: a table in shared memory that is read anew for every
// pack, hence volatile. Kept in registers, as the compiler would, sixteen addresses cost a thread block's worth of
// them.
using RowTable = const volatile std::int64_t*;

template <class Scalar>
__device__ inline void fill_table(const Team& team, const Piece& piece, const Rows& rows, const History<Scalar>& h,
                                  int ages, double* table) {
  for (int a = team.rank; a < ages; a += team.size) {
    reinterpret_cast<std::int64_t*>(table)[a] = piece.row + slot_of(h.head, a, h.slots) * rows.blocks * rows.features;
  }
}

}  // namespace
}  // namespace pydeqsolve
