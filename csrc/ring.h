// One solver's history as Python hands it over: addresses, checked before anything is read from them. Included by
// bindings.cpp alone.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "step.h"

namespace pydeqsolve {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Memory {
  Address first;
  std::uintptr_t bytes;
  bool overlaps(const Memory& other) const {
    return bytes > 0 && other.bytes > 0 && first < other.first + other.bytes && other.first < first + bytes;
  }
};

// Of a tensor whose storage was let go of; bindings.cpp makes a TypeError of it.
struct NoMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_address(Address first, std::int64_t entries, const char* name) {
  if (first == 0 && entries > 0) throw NoMemory(std::string(name) + " must have memory of its own");
}

// Handed over once; every call of the step then names only what changes.
struct Ring {
  Storage storage;
  int slots;
  Kind kind;
  double eps;
  Address R, F, gram, steps_gram, rhs, squares, count;
  std::int64_t samples, blocks, features, sample_stride, slot_stride;

  void check_addresses() const {
    const std::int64_t systems = samples * blocks;
    check_address(R, systems * features, "R");
    check_address(F, systems * features, "F");
    check_address(gram, systems, "gram");
    check_address(steps_gram, kind == Kind::kBroydenGood ? systems : 0, "steps_gram");
    check_address(rhs, systems, "rhs");
    check_address(squares, systems, "squares");
    check_address(count, systems, "count");
  }

  Memory memory(Address first, std::int64_t entries) const {
    const std::uintptr_t size = storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
    return {first, static_cast<std::uintptr_t>(entries) * size};
  }
  Memory rows_from(Address first) const {
    if (samples * blocks * features == 0) return {first, 0};
    return memory(first, (samples - 1) * sample_stride + (slots - 1) * slot_stride + blocks * features);
  }

  // Throws unless no two of the state f, or the next iterate, and z, n samples each, and the history share memory.
  // f may be z itself: both are read only.
  void check_memory(std::int64_t n, Address other, Address z, bool written) const {
    const std::int64_t entries = n * blocks * features;
    check_address(other, entries, written ? "the next iterate" : "f");
    check_address(z, entries, "z");
    for (const Memory& state : {memory(other, entries), memory(z, entries)}) {
      for (const Address first : {R, F}) {
        if (state.overlaps(rows_from(first))) throw std::invalid_argument("a state must not lie in the history's rows");
      }
    }
    if (written && memory(other, entries).overlaps(memory(z, entries))) {
      throw std::invalid_argument("the next iterate must share no memory with f and z");
    }
  }
  // On the host alone: a device's indices cannot be read without waiting for it.
  void check_rows(std::int64_t n, Address index) const {
    check_address(index, n, "rows");
    const auto* const rows = at<const std::int64_t>(index);
    bool inside = true;
    for (std::int64_t i = 0; i < n; ++i) inside = inside && rows[i] >= 0 && rows[i] < samples;
    if (!inside) throw std::invalid_argument("rows must lie in 0 ... " + std::to_string(samples - 1));
  }

  template <class Scalar>
  History<Scalar> history(int head) const {
    return {slots,
            head,
            kind,
            sample_stride,
            slot_stride,
            at<Scalar>(R),
            at<Scalar>(F),
            at<double>(gram),
            at<double>(steps_gram),
            at<double>(rhs),
            at<double>(squares),
            at<std::int32_t>(count),
            eps};
  }
  Rows rows(std::int64_t n, Address index, Address wanted) const {
    return {n, blocks, features, at<const std::int64_t>(index), at<const std::uint8_t>(wanted)};
  }
};

template <class Body>
void with_scalar(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat64:
      return body(double{});
    case Storage::kFloat32:
      return body(float{});
    case Storage::kBFloat16:
      return body(BFloat16{});
    case Storage::kFloat16:
      return body(Half{});
  }
}

}  // namespace
}  // namespace pydeqsolve
