// One solver's ring as Python hands it over: addresses, checked before anything is read from them. Included by
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

inline void check_address(const void* first, std::int64_t entries, const char* name) {
  if (first == nullptr && entries > 0) throw NoMemory(std::string(name) + " must have memory of its own");
}

inline Memory memory(const Ring& ring, const void* first, std::int64_t entries) {
  const auto size = static_cast<std::uintptr_t>(bytes_of(ring.storage));
  return {reinterpret_cast<Address>(first), static_cast<std::uintptr_t>(entries) * size};
}

// Of R or F.
inline Memory rows_of(const Ring& ring, const void* first) {
  if (ring.samples * ring.blocks * ring.features == 0) return {0, 0};
  const std::int64_t last = (ring.samples - 1) * ring.sample_stride + (ring.slots - 1) * ring.slot_stride;
  return memory(ring, first, last + ring.blocks * ring.features);
}

inline void check_ring(const Ring& ring) {
  if (ring.slots < 1 || ring.slots > kMaxSlots) throw std::invalid_argument("slots out of range");
  if (static_cast<int>(ring.storage) < 0 || ring.storage > Storage::kFloat16) {
    throw std::invalid_argument("storage out of range");
  }
  const std::int64_t systems = ring.samples * ring.blocks;
  check_address(ring.R, systems * ring.features, "R");
  check_address(ring.F, systems * ring.features, "F");
  check_address(ring.gram, systems, "gram");
  check_address(ring.steps_gram, ring.kind == Kind::kBroydenGood ? systems : 0, "steps_gram");
  check_address(ring.rhs, systems, "rhs");
  check_address(ring.squares, systems, "squares");
  check_address(ring.count, systems, "count");
}

// Throws unless no two of z_next, f and z, n samples each and as far as the call has them, and the history share
// memory. f may be z itself: both are read only.
inline void check_states(const Call& call) {
  const Ring& ring = call.ring;
  const std::int64_t entries = call.n * ring.blocks * ring.features;
  const Memory states[] = {memory(ring, call.z_next, entries), memory(ring, call.f, entries),
                           memory(ring, call.z, entries)};
  for (const Memory& state : states) {
    for (const void* first : {ring.R, ring.F}) {
      if (state.first && state.overlaps(rows_of(ring, first))) {
        throw std::invalid_argument("a state must not lie in the history's rows");
      }
    }
  }
  if (states[0].first && (states[0].overlaps(states[1]) || states[0].overlaps(states[2]))) {
    throw std::invalid_argument("the next iterate must share no memory with f and z");
  }
}

// On the host alone: a device's indices cannot be read without waiting for it.
inline void check_rows(const Call& call) {
  bool inside = true;
  for (std::int64_t i = 0; call.rows && i < call.n; ++i)
    inside = inside && call.rows[i] >= 0 && call.rows[i] < call.ring.samples;
  if (!inside) throw std::invalid_argument("rows must lie in 0 ... " + std::to_string(call.ring.samples - 1));
}

}  // namespace
}  // namespace pydeqsolve
