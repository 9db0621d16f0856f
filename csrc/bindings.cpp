// The one pybind11 file. Tensors arrive as addresses; pydeqsolve/ops.py has checked dtype, device and contiguity.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "judge.h"
#include "step.h"

namespace py = pybind11;
using namespace pydeqsolve;

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

// One solver's history, as Python hands it over once; every call of the step then names only what changes.
struct Ring {
  Storage storage;
  int slots;
  Kind kind;
  double eps;
  Address R, F, gram, steps_gram, rhs, squares, count;
  std::int64_t samples, blocks, features, sample_stride, slot_stride;

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

// Asks for large pages under long rows: they are read side by side, a page table entry each.
void use_large_pages([[maybe_unused]] Address address, [[maybe_unused]] std::uintptr_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
  const std::uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

void measure(const Ring& ring, int head, std::int64_t n, Address index, Address wanted, Address f, Address z,
             Address norms, int norm, int threads) {
  ring.check_memory(n, f, z, false);
  ring.check_rows(n, index);
  py::gil_scoped_release release;
  with_scalar(ring.storage, [&](auto scalar) {
    using S = decltype(scalar);
    measure_cpu<S>(ring.rows(n, index, wanted), ring.history<S>(head), at<const S>(f), at<const S>(z),
                   at<double>(norms), static_cast<Norm>(norm), threads);
  });
}

// A whole step on the host; returns how many samples have finished and how many were left behind.
std::pair<std::int64_t, std::int64_t> step(const Ring& ring, int head, std::int64_t n, Address index, Address wanted,
                                           Address f, Address z, Address table, double safeguard, double entries,
                                           bool is_max, int coupling, double ridge, double damping, Address before,
                                           Address best, Address mode, Address z_next, int threads) {
  ring.check_memory(n, z_next, f, true);
  ring.check_memory(n, z_next, z, true);
  ring.check_rows(n, index);
  py::gil_scoped_release release;
  Counts counts{0, 0};
  with_scalar(ring.storage, [&](auto scalar) {
    using S = decltype(scalar);
    counts = step_cpu<S>(ring.rows(n, index, wanted), ring.history<S>(head), at<const S>(f), at<const S>(z),
                         {safeguard, ring.eps, entries, is_max}, at<Record>(table),
                         {static_cast<Coupling>(coupling), ridge, damping, at<const S>(before), at<S>(best)},
                         at<std::uint8_t>(mode), at<S>(z_next), threads);
  });
  return {counts.finished, counts.left_behind};
}

void advance(const Ring& ring, int head, std::int64_t n, Address index, Address mode, Address dropped, int coupling,
             double ridge, double damping, Address z, Address z_next, int threads) {
  ring.check_memory(n, z_next, z, true);
  ring.check_rows(n, index);
  py::gil_scoped_release release;
  std::vector<double> gamma(static_cast<std::size_t>(n * ring.blocks * ring.slots));
  with_scalar(ring.storage, [&](auto scalar) {
    using S = decltype(scalar);
    const Rows rows = ring.rows(n, index, 0);
    const History<S> history = ring.history<S>(head);
    weights_cpu<S>(rows, history, static_cast<Coupling>(coupling), ridge, at<const std::uint8_t>(mode), gamma.data(),
                   at<std::int32_t>(dropped), threads);
    mix_cpu<S>(rows, history, gamma.data(), at<const std::uint8_t>(mode), damping, at<const S>(z), at<S>(z_next),
               threads);
  });
}

std::pair<std::int64_t, std::int64_t> judge_samples(std::int64_t n, std::int64_t blocks, Address norms, Address dropped,
                                                    Address table, double safeguard, double eps, double entries,
                                                    bool is_max, Address mode) {
  const Counts counts = judge_all(n, blocks, at<const double>(norms), at<const std::int32_t>(dropped),
                                  at<Record>(table), {safeguard, eps, entries, is_max}, at<std::uint8_t>(mode));
  return {counts.finished, counts.left_behind};
}

std::pair<std::int64_t, std::int64_t> judge_front_samples(std::int64_t n, std::int64_t blocks, Address norms,
                                                          Address wanted, Address table, Address records,
                                                          double safeguard, double margin, bool latest,
                                                          std::int64_t window, int norm, double entries, Address mode,
                                                          Address broken, Address open) {
  const FrontCounts counts = judge_fronts(n, blocks, at<const double>(norms), at<const bool>(wanted), at<Record>(table),
                                          at<Block>(records), {safeguard, margin, latest, window, norm, entries},
                                          at<std::uint8_t>(mode), at<bool>(broken), at<bool>(open));
  return {counts.finished, counts.broken};
}

#if defined(PYDEQSOLVE_WITH_CUDA)
void check(const char* error) {
  if (error) throw std::runtime_error(std::string("pydeqsolve: CUDA launch failed: ") + error);
}

void measure_on_cuda(const Ring& ring, int head, std::int64_t n, Address index, Address wanted, Address f, Address z,
                     Address norms, int norm, Address partial, Address stream) {
  ring.check_memory(n, f, z, false);
  with_scalar(ring.storage, [&](auto scalar) {
    using S = decltype(scalar);
    check(measure_cuda<S>(ring.rows(n, index, wanted), ring.history<S>(head), at<const S>(f), at<const S>(z),
                          at<double>(norms), static_cast<Norm>(norm), at<double>(partial), at<void>(stream)));
  });
}

void advance_on_cuda(const Ring& ring, int head, std::int64_t n, Address index, Address mode, Address gamma,
                     Address dropped, int coupling, double ridge, double damping, Address z, Address z_next,
                     Address workspace, Address stream) {
  ring.check_memory(n, z_next, z, true);
  with_scalar(ring.storage, [&](auto scalar) {
    using S = decltype(scalar);
    const Rows rows = ring.rows(n, index, 0);
    const History<S> history = ring.history<S>(head);
    check(advance_cuda<S>(rows, history, static_cast<Coupling>(coupling), ridge, at<const std::uint8_t>(mode),
                          at<double>(gamma), at<std::int32_t>(dropped), damping, at<const S>(z), at<S>(z_next),
                          at<double>(workspace), at<void>(stream)));
  });
}

void judge_on_cuda(std::int64_t n, std::int64_t blocks, Address norms, Address dropped, Address table, double safeguard,
                   double eps, double entries, bool is_max, Address mode, Address stream) {
  check(judge_cuda(n, blocks, at<const double>(norms), at<const std::int32_t>(dropped), at<Record>(table),
                   {safeguard, eps, entries, is_max}, at<std::uint8_t>(mode), at<void>(stream)));
}

void keep_on_cuda(std::int64_t n, std::int64_t bytes, Address table, Address rows, Address from, Address to,
                  Address stream) {
  check(keep_cuda(n, bytes, at<const Record>(table), at<const std::int64_t>(rows), at<const void>(from), at<void>(to),
                  at<void>(stream)));
}

std::int64_t workspace_doubles(const Ring& ring, std::int64_t n) {
  return partial_doubles(ring.rows(n, 0, 0), ring.slots);
}
#endif

}  // namespace

// Counts the changes of what is bound below; pydeqsolve/ops.py has the same number and refuses another.
constexpr int kInterface = 10;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native step of pydeqsolve; called by pydeqsolve.ops alone.";
  py::class_<Ring>(m, "Ring").def(
      py::init([](int storage, int slots, int kind, double eps, std::int64_t samples, std::int64_t blocks,
                  std::int64_t features, std::int64_t sample_stride, std::int64_t slot_stride, Address R, Address F,
                  Address gram, Address steps_gram, Address rhs, Address squares, Address count) {
        if (slots < 1 || slots > kMaxSlots) throw std::invalid_argument("slots out of range");
        if (storage < 0 || storage > static_cast<int>(Storage::kFloat16)) {
          throw std::invalid_argument("storage out of range");
        }
        return Ring{static_cast<Storage>(storage),
                    slots,
                    static_cast<Kind>(kind),
                    eps,
                    R,
                    F,
                    gram,
                    steps_gram,
                    rhs,
                    squares,
                    count,
                    samples,
                    blocks,
                    features,
                    sample_stride,
                    slot_stride};
      }));
  m.attr("INTERFACE") = kInterface;
  m.attr("MAX_SLOTS") = kMaxSlots;
  m.def("measure", &measure);
  m.def("advance", &advance);
  m.def("step", &step);
  m.def("use_large_pages", &use_large_pages);
  m.def("judge", &judge_samples);
  m.def("judge_front", &judge_front_samples);
  m.attr("RECORD") = sizeof(Record) / sizeof(double);
  m.attr("BLOCK") = sizeof(Block) / sizeof(double);
  m.def("cpu_isa", &cpu_isa);
  m.def("choose_cpu_isa", [](const std::string& name) { return choose_cpu_isa(name.c_str()); });
#if defined(PYDEQSOLVE_WITH_CUDA)
  m.def("measure_cuda", &measure_on_cuda);
  m.def("advance_cuda", &advance_on_cuda);
  m.def("judge_cuda", &judge_on_cuda);
  m.def("keep_cuda", &keep_on_cuda);
  m.def("workspace_doubles", &workspace_doubles);
  m.def("device_count", &cuda_device_count);
  m.attr("cuda_architectures") = PYDEQSOLVE_CUDA_ARCHITECTURES;
#else
  m.def("device_count", [] { return 0; });
  m.attr("cuda_architectures") = "";
#endif
}
