// The CUDA step as a shared library that runs on the CPU: the kernels' own source under the emulator, behind a C
// interface for ctypes (tests/emulation/backend.py).
#include "cuda_emu.h"
// After the emulator, which stands in for the language.
#include "cuda/step_cuda.cu"

EMULATION_DEFINE_SWITCH

using namespace pydeqsolve;

// Rows and History of one call, as backend.py fills it in; fields as in csrc/step.h.
struct Call {
  std::int64_t n, blocks, features;
  const std::int64_t* rows;
  const std::uint8_t* wanted;
  std::int64_t sample_stride, slot_stride;
  std::int32_t storage, slots, head, kind;
  void *R, *F;
  double *gram, *steps_gram, *rhs, *squares;
  std::int32_t* count;
  double eps;
};

namespace {

template <class Body>
const char* with(const Call& call, const Body& body) {
  const Rows rows{call.n, call.blocks, call.features, call.rows, call.wanted};
  const auto run = [&](auto scalar) {
    using Scalar = decltype(scalar);
    const History<Scalar> history{call.slots,
                                  call.head,
                                  static_cast<Kind>(call.kind),
                                  call.sample_stride,
                                  call.slot_stride,
                                  static_cast<Scalar*>(call.R),
                                  static_cast<Scalar*>(call.F),
                                  call.gram,
                                  call.steps_gram,
                                  call.rhs,
                                  call.squares,
                                  call.count,
                                  call.eps};
    return body(rows, history, scalar);
  };
  switch (static_cast<Storage>(call.storage)) {
    case Storage::kFloat64:
      return run(double{});
    case Storage::kFloat32:
      return run(float{});
    case Storage::kBFloat16:
      return run(BFloat16{});
    case Storage::kFloat16:
      return run(Half{});
  }
  return "no such storage";
}

}  // namespace

extern "C" {

const char* emulated_measure(const Call* call, const void* f, const void* z, double* norms, int norm, double* partial) {
  return with(*call, [&](const Rows& rows, const auto& history, auto scalar) {
    using Scalar = decltype(scalar);
    return measure_cuda<Scalar>(rows, history, static_cast<const Scalar*>(f), static_cast<const Scalar*>(z), norms,
                                static_cast<Norm>(norm), partial, nullptr);
  });
}

const char* emulated_weights(const Call* call, int coupling, double ridge, const std::uint8_t* mode, double* gamma,
                             std::int32_t* dropped, double* workspace) {
  return with(*call, [&](const Rows& rows, const auto& history, auto scalar) {
    using Scalar = decltype(scalar);
    return weights_cuda<Scalar>(rows, history, static_cast<Coupling>(coupling), ridge, mode, gamma, dropped, workspace,
                                nullptr);
  });
}

const char* emulated_mix(const Call* call, const double* gamma, const std::uint8_t* mode, double beta, const void* z,
                         void* z_next) {
  return with(*call, [&](const Rows& rows, const auto& history, auto scalar) {
    using Scalar = decltype(scalar);
    return mix_cuda<Scalar>(rows, history, gamma, mode, beta, static_cast<const Scalar*>(z),
                            static_cast<Scalar*>(z_next), nullptr);
  });
}

const char* emulated_advance(const Call* call, int coupling, double ridge, const std::uint8_t* mode, double* gamma,
                             std::int32_t* dropped, double beta, const void* z, void* z_next, double* workspace) {
  return with(*call, [&](const Rows& rows, const auto& history, auto scalar) {
    using Scalar = decltype(scalar);
    return advance_cuda<Scalar>(rows, history, static_cast<Coupling>(coupling), ridge, mode, gamma, dropped, beta,
                                static_cast<const Scalar*>(z), static_cast<Scalar*>(z_next), workspace, nullptr);
  });
}

const char* emulated_judge(std::int64_t n, std::int64_t T, const double* norms, const std::int32_t* dropped,
                           void* table, double safeguard, double eps, double entries, int is_max, std::uint8_t* mode) {
  return judge_cuda(n, T, norms, dropped, static_cast<Record*>(table), {safeguard, eps, entries, is_max != 0}, mode,
                    nullptr);
}

const char* emulated_keep(std::int64_t n, std::int64_t bytes, const void* table, const std::int64_t* rows,
                          const void* from, void* to) {
  return keep_cuda(n, bytes, static_cast<const Record*>(table), rows, from, to, nullptr);
}

std::int64_t emulated_workspace_doubles(const Call* call) {
  return partial_doubles({call->n, call->blocks, call->features, call->rows, call->wanted}, call->slots);
}

// Where piece `index` of a call lies: block, at, row, chunk, begin, end.
void emulated_piece(const Call* call, std::int64_t index, std::int64_t* out) {
  const Rows rows{call->n, call->blocks, call->features, call->rows, call->wanted};
  const Plan plan = plan_of<float>(rows, call->sample_stride | call->slot_stride, {call->R, call->F});
  const Piece piece(rows, plan, call->sample_stride, index);
  const std::int64_t fields[] = {piece.block, piece.at, piece.row, piece.chunk, piece.begin, piece.end, plan.pieces};
  std::copy(std::begin(fields), std::end(fields), out);
}

int emulated_device_count() { return cuda_device_count(); }
void emulated_choose_schedule(int schedule) { emulation::schedule = schedule; }
std::int64_t emulated_launches() { return emulation::launches; }

}  // extern "C"
