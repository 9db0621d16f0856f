// How a thread reads and writes rows: 16 bytes at a time, at the places that a ring has them.
#pragma once
#include "cuda/pieces.cuh"

namespace pydeqsolve {
namespace {

// 16 bytes of consecutive features: what one thread takes at a time, and the parts in which it works on them.
template <class Scalar, bool kShort = sizeof(Scalar) == 2>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(Scalar)), kParts = 1, kPart = kSize;
  Scalar entries[kSize];

  __device__ Scalar get(int k) const { return entries[k]; }
  __device__ void set(int k, Scalar x) { entries[k] = x; }
  __device__ Wide<Scalar> value(int k) const { return entries[k]; }
  __device__ Wide<Scalar> value(int, int k) const { return entries[k]; }  // entry k of a part
};

// Entries of 16 bits lie two to a word: the compiler would give each a register of its own.
template <class Scalar>
struct alignas(16) Pack<Scalar, true> {
  static constexpr int kSize = 8, kParts = 4, kPart = 2;
  std::uint32_t words[kParts] = {};

  __device__ Scalar get(int k) const { return half(words[k / 2], k % 2); }
  __device__ void set(int k, Scalar x) {
    const int shift = 16 * (k % 2);
    words[k / 2] = (words[k / 2] & ~(0xffffu << shift)) | std::uint32_t{x.bits} << shift;
  }
  __device__ float value(int k) const { return static_cast<float>(get(k)); }
  // By selection: registers cannot be indexed, and `part` is known only as the kernel runs.
  __device__ float value(int part, int k) const {
    const std::uint32_t first = part & 1 ? words[1] : words[0], last = part & 1 ? words[3] : words[2];
    return static_cast<float>(half(part & 2 ? last : first, k));
  }
  __device__ static Scalar half(std::uint32_t word, int k) {
    Scalar x;
    x.bits = static_cast<std::uint16_t>(word >> 16 * k);
    return x;
  }
};

// The `length` features from p on, zeros after them: those change no sum. One load where rows are aligned.
template <bool kVector, class Scalar>
__device__ inline Pack<Scalar> load(const Scalar* p, int length) {
  Pack<Scalar> pack;
  if constexpr (kVector) {
    pack = *reinterpret_cast<const Pack<Scalar>*>(p);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Scalar>::kSize; ++k) pack.set(k, k < length ? p[k] : Scalar(0));
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
      if (k < length) p[k] = pack.get(k);
    }
  }
}

// Calls body(at, length) for every pack of the piece that is this thread's; a place has begin and end.
template <class Scalar, class Place, class Body>
__device__ inline void for_each_pack(const Team& team, const Place& piece, const Body& body) {
  constexpr int kSize = Pack<Scalar>::kSize;
  for (std::int64_t at = piece.begin + team.rank * kSize; at < piece.end; at += team.size * kSize) {
    body(at, piece.end - at < kSize ? static_cast<int>(piece.end - at) : kSize);
  }
}

// Where the row of each age starts in R and F, for one block: a table in shared memory that is read anew for every
// pack, hence volatile. Kept in registers, as the compiler would, sixteen addresses cost a thread block's worth of
// them.
using RowTable = const volatile std::int64_t*;

__device__ inline void fill_table(const Team& team, const Piece& piece, const Ring& ring, int ages, double* table) {
  for (int a = team.rank; a < ages; a += team.size) {
    reinterpret_cast<std::int64_t*>(table)[a] = piece.row + slot_of(ring.head, a, ring.slots) * ring.slot_stride;
  }
}

}  // namespace
}  // namespace pydeqsolve
