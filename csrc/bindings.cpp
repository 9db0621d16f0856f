// The one pybind11 file. Tensors arrive as addresses; pydeqsolve/step/backend.py has checked dtype, device and
// contiguity.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "judge.h"
#include "krylov_solve.h"
#include "ring.h"
#include "small_solve.h"
#include "step.h"

namespace py = pybind11;
using namespace pydeqsolve;

namespace {

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
  check_address(mode, n * ring.blocks, "modes");
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
  check_address(index, n, "rows");
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
  check_address(index, n, "rows");
  check_address(mode, n * ring.blocks, "modes");
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

template <std::size_t N>
py::tuple tuple_of(const char* const (&names)[N]) {
  py::tuple out(N);
  for (std::size_t i = 0; i < N; ++i) out[i] = names[i];
  return out;
}

}  // namespace

// Counts the changes of what is bound below; pydeqsolve/step/native.py has the same number and refuses another.
constexpr int kInterface = 11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native step of pydeqsolve; called by pydeqsolve.step.native alone.";
  py::class_<Ring>(m, "Ring").def(
      py::init([](int storage, int slots, int kind, double eps, std::int64_t samples, std::int64_t blocks,
                  std::int64_t features, std::int64_t sample_stride, std::int64_t slot_stride, Address R, Address F,
                  Address gram, Address steps_gram, Address rhs, Address squares, Address count) {
        if (slots < 1 || slots > kMaxSlots) throw std::invalid_argument("slots out of range");
        if (storage < 0 || storage > static_cast<int>(Storage::kFloat16)) {
          throw std::invalid_argument("storage out of range");
        }
        const Ring ring{static_cast<Storage>(storage),
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
        ring.check_addresses();
        return ring;
      }));
  py::register_exception<NoMemory>(m, "NoMemory", PyExc_TypeError);
  m.attr("INTERFACE") = kInterface;
  m.attr("MAX_SLOTS") = kMaxSlots;
  m.def("measure", &measure);
  m.def("advance", &advance);
  m.def("step", &step);
  m.def("use_large_pages", &use_large_pages);
  m.def("judge", &judge_samples);
  m.def("judge_front", &judge_front_samples);
#define PYDEQSOLVE_NAME(name) #name,
  constexpr const char* record[] = {PYDEQSOLVE_RECORD(PYDEQSOLVE_NAME)};
  constexpr const char* block[] = {PYDEQSOLVE_BLOCK(PYDEQSOLVE_NAME)};
#undef PYDEQSOLVE_NAME
  m.attr("SAMPLE") = tuple_of(record);
  m.attr("BLOCK") = tuple_of(block);
  using free = py::call_guard<py::gil_scoped_release>;
  py::class_<KrylovSolve>(m, "Krylov")
      .def(py::init<bool, std::int64_t, std::int64_t, double, Address>())
      .def("begin", &KrylovSolve::begin, free())
      .def("append", &KrylovSolve::append, free())
      .def("combine", &KrylovSolve::combine, free())
      .def("accept", &KrylovSolve::accept, free())
      .def("raise_", &KrylovSolve::raise, free())
      .def("lower", &KrylovSolve::lower, free())
      .def("remeasure", &KrylovSolve::remeasure, free())
      .def("judge", &KrylovSolve::judge, free());
  py::class_<SmallSolve>(m, "Small")
      .def(py::init<bool, std::int64_t, int, double, Address, Address, double, double, Address, Address, double, int>())
      .def("active", &SmallSolve::active, free())
      .def("column", &SmallSolve::column, free())
      .def("solve", &SmallSolve::solve, free())
      .def("measure", &SmallSolve::measure, free())
      .def("judge", &SmallSolve::judge, free())
      .def("raise_", &SmallSolve::raise, free())
      .def("lower", &SmallSolve::lower, free());
  m.attr("MOST_UNKNOWNS") = kMostUnknowns;
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
