// The one pybind11 file. Tensors arrive as addresses; pydeqsolve/step/backend.py has checked dtype, device and
// contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "few_solve.h"
#include "judge.h"
#include "krylov_device.h"
#include "krylov_solve.h"
#include "retire.h"
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

// What is constant in a solve, handed over once.
struct Solve {
  Ring ring;
  Rule rule;
  Front front;
  bool on_cuda;

  const Passes& passes() const {
#if defined(PYDEQSOLVE_WITH_CUDA)
    if (on_cuda) return cuda_passes();
#endif
    return cpu_passes();
  }
  // threads: of the host. workspace, stream: of a device.
  Call call(int head, std::int64_t n, Address rows, int threads, Address workspace, Address stream) const {
    Call call{};
    call.ring = ring, call.ring.head = head, call.rule = rule;
    call.n = n, call.rows = at<const std::int64_t>(rows);
    call.workspace = at<double>(workspace), call.stream = at<void>(stream), call.threads = threads;
    return call;
  }
  // Of the states of a call: those that the pass reads and writes.
  void check(const Call& call) const {
    check_states(call);
    if (!on_cuda) check_rows(call);
  }
};

void check_launch(const char* error) {
  if (error) throw std::runtime_error(std::string("pydeqsolve: CUDA launch failed: ") + error);
}

Solve bind(int storage, int slots, int kind, double eps, std::int64_t samples, std::int64_t blocks,
           std::int64_t features, std::int64_t sample_stride, std::int64_t slot_stride, bool on_cuda, int coupling,
           double ridge, double damping, Address R, Address F, Address gram, Address steps_gram, Address rhs,
           Address squares, Address count, double safeguard, double divisor, int norm, double margin, bool latest,
           std::int64_t window) {
  Solve solve{};
  Ring& ring = solve.ring;
  ring.storage = static_cast<Storage>(storage), ring.slots = slots, ring.kind = static_cast<Kind>(kind);
  ring.coupling = static_cast<Coupling>(coupling), ring.ridge = ridge, ring.damping = damping, ring.eps = eps;
  ring.samples = samples, ring.blocks = blocks, ring.features = features;
  ring.sample_stride = sample_stride, ring.slot_stride = slot_stride;
  ring.R = at<void>(R), ring.F = at<void>(F), ring.gram = at<double>(gram), ring.steps_gram = at<double>(steps_gram);
  ring.rhs = at<double>(rhs), ring.squares = at<double>(squares), ring.count = at<std::int32_t>(count);
  check_ring(ring);
  solve.rule = {safeguard, eps, divisor, static_cast<Norm>(norm)};
  solve.front = {margin, latest, window};
  solve.on_cuda = on_cuda;
  return solve;
}

void measure(const Solve& solve, int head, std::int64_t n, Address rows, Address wanted, Address f, Address z,
             Address norms, int threads, Address workspace, Address stream) {
  check_address(at<void>(rows), n, "rows");
  Call call = solve.call(head, n, rows, threads, workspace, stream);
  call.wanted = at<const std::uint8_t>(wanted), call.f = at<const void>(f), call.z = at<const void>(z);
  call.norms = at<double>(norms);
  const std::int64_t entries = n * solve.ring.blocks * solve.ring.features;
  check_address(call.f, entries, "f");
  check_address(call.z, entries, "z");
  solve.check(call);
  py::gil_scoped_release release;
  check_launch(solve.passes().measure(call));
}

// gamma (n, T, M) is null on the host.
void advance(const Solve& solve, int head, std::int64_t n, Address rows, Address mode, Address gamma, Address dropped,
             Address z, Address z_next, int threads, Address workspace, Address stream) {
  check_address(at<void>(rows), n, "rows");
  Call call = solve.call(head, n, rows, threads, workspace, stream);
  call.mode = at<std::uint8_t>(mode), call.gamma = at<double>(gamma), call.dropped = at<std::int32_t>(dropped);
  call.z = at<const void>(z), call.z_next = at<void>(z_next);
  const std::int64_t blocks = n * solve.ring.blocks;
  check_address(call.z_next, blocks * solve.ring.features, "the next iterate");
  check_address(call.z, blocks * solve.ring.features, "z");
  check_address(call.mode, blocks, "modes");
  solve.check(call);
  py::gil_scoped_release release;
  check_launch(solve.passes().advance(call));
}

// A whole step on the host; rows null: all. Returns how many samples have finished and how many were left behind.
std::pair<std::int64_t, std::int64_t> step(const Solve& solve, int head, std::int64_t n, Address rows, Address wanted,
                                           Address f, Address z, Address table, Address before, Address best,
                                           Address mode, Address z_next, int threads) {
  Call call = solve.call(head, n, rows, threads, 0, 0);
  call.wanted = at<const std::uint8_t>(wanted), call.f = at<const void>(f), call.z = at<const void>(z);
  call.table = at<Sample>(table), call.before = at<const void>(before), call.best = at<void>(best);
  call.mode = at<std::uint8_t>(mode), call.z_next = at<void>(z_next);
  const std::int64_t entries = n * solve.ring.blocks * solve.ring.features;
  check_address(call.z_next, entries, "the next iterate");
  check_address(call.f, entries, "f");
  check_address(call.z, entries, "z");
  solve.check(call);
  py::gil_scoped_release release;
  const Counts counts = solve.passes().step(call);
  return {counts.finished, counts.left_behind};
}

// The counts mean nothing on a device: reading them would wait for it.
std::pair<std::int64_t, std::int64_t> judge_by_samples(const Solve& solve, std::int64_t n, Address norms,
                                                       Address dropped, Address table, Address mode,
                                                       [[maybe_unused]] Address stream) {
#if defined(PYDEQSOLVE_WITH_CUDA)
  if (solve.on_cuda) {
    Call call = solve.call(0, 0, 0, 0, 0, stream);
    call.n = n, call.norms = at<double>(norms), call.dropped = at<std::int32_t>(dropped);
    call.table = at<Sample>(table), call.mode = at<std::uint8_t>(mode);
    check_launch(judge_cuda(call));
    return {0, 0};
  }
#endif
  const Counts counts = judge_samples(n, solve.ring.blocks, at<const double>(norms), at<const std::int32_t>(dropped),
                                      at<Sample>(table), solve.rule, at<std::uint8_t>(mode));
  return {counts.finished, counts.left_behind};
}

// On the host.
std::pair<std::int64_t, std::int64_t> judge_by_blocks(const Solve& solve, std::int64_t n, Address norms, Address wanted,
                                                      Address table, Address blocks, Address mode, Address broken,
                                                      Address open) {
  const BlockCounts counts = judge_all_blocks(n, solve.ring.blocks, at<const double>(norms), at<const bool>(wanted),
                                              at<Sample>(table), at<Block>(blocks), solve.rule, solve.front,
                                              at<std::uint8_t>(mode), at<bool>(broken), at<bool>(open));
  return {counts.finished, counts.broken};
}

// n copies of one row, the records of samples before their first step.
void fill(Address table, std::int64_t n, const std::array<double, sizeof(Sample) / sizeof(double)>& row) {
  for (std::int64_t i = 0; i < n; ++i) std::memcpy(at<Sample>(table) + i, row.data(), sizeof(Sample));
}

void leave_batch(const Solve& solve, std::int64_t n, Address rows, Address z, Address table, Address best, Address left,
                 bool ended, int threads) {
  Call call = solve.call(0, n, rows, threads, 0, 0);
  call.z = at<const void>(z), call.table = at<Sample>(table), call.best = at<void>(best);
  check_rows(call);
  py::gil_scoped_release release;
  leave(call, ended, at<Sample>(left));
}

using Part = std::tuple<Address, Address, std::int64_t>;  // from, to, bytes of a sample
std::int64_t close_up_batch(std::int64_t n, Address table, int threads, const std::vector<Part>& parts) {
  std::vector<Kept> kept;
  for (const auto& [from, to, bytes] : parts) kept.push_back({at<const void>(from), at<void>(to), bytes});
  py::gil_scoped_release release;
  return close_up(n, at<const Sample>(table), threads, kept);
}

std::int64_t tell_all(std::int64_t B, Address left, Address residual, Address evaluations, Address status,
                      Address rejections, Address rank_losses) {
  return tell(B, at<const Sample>(left), at<double>(residual), at<std::int64_t>(evaluations), at<std::int64_t>(status),
              at<std::int64_t>(rejections), at<std::int64_t>(rank_losses));
}

#if defined(PYDEQSOLVE_WITH_CUDA)
void keep(std::int64_t n, std::int64_t bytes, Address table, Address rows, Address from, Address to, Address stream) {
  check_launch(keep_cuda(n, bytes, at<const Sample>(table), at<const std::int64_t>(rows), at<const void>(from),
                         at<void>(to), at<void>(stream)));
}

void krylov_on_device(const std::string& name, const KrylovCall& call) {
  int pass = 0;
  while (pass < static_cast<int>(KrylovPass::kCount) && name != kKrylovPasses[pass]) ++pass;
  if (name != kKrylovPasses[pass]) throw std::invalid_argument("no pass has this name");
  const std::int64_t entries = call.B * call.N;
  check_address(call.g, entries, "g");
  check_address(call.product, name == "append" || name == "accept" || name == "remeasure" ? entries : 0, "a product");
  check_launch(krylov_cuda(static_cast<KrylovPass>(pass), call));
}

// A field of a call as Python has it: a number, or an address.
template <class Field>
void bind_field(py::class_<KrylovCall>& call, const char* name, Field KrylovCall::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    call.def_property(
        name, [field](const KrylovCall& c) { return reinterpret_cast<Address>(c.*field); },
        [field](KrylovCall& c, Address first) { c.*field = at<std::remove_pointer_t<Field>>(first); });
  } else {
    call.def_readwrite(name, field);
  }
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
constexpr int kInterface = 16;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native step of pydeqsolve; called by pydeqsolve.step.native alone.";
  py::class_<Solve>(m, "Solve").def(py::init(&bind));
  py::register_exception<NoMemory>(m, "NoMemory", PyExc_TypeError);
  m.attr("INTERFACE") = kInterface;
  m.attr("MAX_SLOTS") = kMaxSlots;
  m.def("measure", &measure);
  m.def("advance", &advance);
  m.def("step", &step);
  m.def("use_large_pages", &use_large_pages);
  m.def("judge_samples", &judge_by_samples);
  m.def("judge_blocks", &judge_by_blocks);
  m.def("fill", &fill);
  m.def("leave", &leave_batch);
  m.def("close_up", &close_up_batch);
  m.def("tell", &tell_all);
#define PYDEQSOLVE_NAME(name) #name,
  constexpr const char* sample[] = {PYDEQSOLVE_SAMPLE(PYDEQSOLVE_NAME)};
  constexpr const char* block[] = {PYDEQSOLVE_BLOCK(PYDEQSOLVE_NAME)};
#undef PYDEQSOLVE_NAME
  m.attr("SAMPLE") = tuple_of(sample);
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
      .def("scale", &KrylovSolve::scale, free())
      .def("settle", &KrylovSolve::settle, free())
      .def("judge", &KrylovSolve::judge, free());
  py::class_<FewSolve>(m, "Few")
      .def(py::init<int, int, int, double, std::int64_t, int, std::int64_t, double, double, double, double, int, double,
                    double, double, Address, Address, bool, Address, Address, Address, Address, Address, Address,
                    Address, Address>())
      .def("set_tolerance", &FewSolve::set_tolerance)
      .def("step", &FewSolve::step, free())
      .def("tell", &FewSolve::tell, free())
      .def("doubt", &FewSolve::doubt, free())
      .def("records", &FewSolve::records, free());
  py::class_<SmallSolve>(m, "Small")
      .def(py::init<bool, std::int64_t, int, double, Address, Address, double, double, Address, Address, double, int>())
      .def("active", &SmallSolve::active, free())
      .def("column", &SmallSolve::column, free())
      .def("solve", &SmallSolve::solve, free())
      .def("measure", &SmallSolve::measure, free())
      .def("judge", &SmallSolve::judge, free())
      .def("raise_", &SmallSolve::raise, free())
      .def("lower", &SmallSolve::lower, free());
  m.def("cpu_isa", &cpu_isa);
  m.def("choose_cpu_isa", [](const std::string& name) { return choose_cpu_isa(name.c_str()); });
#if defined(PYDEQSOLVE_WITH_CUDA)
  m.def("keep", &keep);
  py::class_<KrylovCall> call(m, "KrylovCall");
  call.def(py::init<>());
#define PYDEQSOLVE_BIND(name) bind_field(call, #name, &KrylovCall::name);
  PYDEQSOLVE_KRYLOV_CALL(PYDEQSOLVE_BIND)
#undef PYDEQSOLVE_BIND
  m.def("krylov", &krylov_on_device);
  m.def("krylov_workspace_doubles", &krylov_workspace_doubles);
  m.attr("KRYLOV_SAMPLE_BYTES") = sizeof(KrylovSample);
  m.attr("KRYLOV_COUNTS") = static_cast<int>(kKrylovCounts);
  m.attr("KRYLOV_MOST_VECTORS") = kMostVectors;
  m.def("workspace_doubles", [](const Solve& solve, std::int64_t n) { return workspace_doubles(solve.ring, n); });
  m.def("device_count", &cuda_device_count);
  m.attr("cuda_architectures") = PYDEQSOLVE_CUDA_ARCHITECTURES;
#else
  m.def("device_count", [] { return 0; });
  m.attr("cuda_architectures") = "";
#endif
}
