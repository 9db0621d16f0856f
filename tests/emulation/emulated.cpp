// The CUDA kernels as a shared library that runs on the CPU: the kernels' own source under the emulator, behind a C
// interface for ctypes (tests/emulation/backend.py).
#include "cuda_emu.h"
// After the emulator, which stands in for the language.
#include "cuda/krylov_cuda.cu"
#include "cuda/step_cuda.cu"

EMULATION_DEFINE_SWITCH

using namespace pydeqsolve;

extern "C" {

std::int64_t emulated_call_bytes() { return sizeof(Call); }
const char* emulated_measure(const Call* call) { return cuda_passes().measure(*call); }
const char* emulated_weights(const Call* call) { return cuda_passes().weights(*call); }
const char* emulated_mix(const Call* call) { return cuda_passes().mix(*call); }
const char* emulated_advance(const Call* call) { return cuda_passes().advance(*call); }
const char* emulated_judge(const Call* call) { return judge_cuda(*call); }

const char* emulated_keep(std::int64_t n, std::int64_t bytes, const void* table, const std::int64_t* rows,
                          const void* from, void* to) {
  return keep_cuda(n, bytes, static_cast<const Sample*>(table), rows, from, to, nullptr);
}

std::int64_t emulated_workspace_doubles(const Call* call) { return workspace_doubles(call->ring, call->n); }

// Where piece `index` of a call lies: block, at, row, chunk, begin, end.
void emulated_piece(const Call* call, std::int64_t index, std::int64_t* out) {
  const Plan plan = plan_of<float>(*call, {});
  const Piece piece(*call, plan, index);
  const std::int64_t fields[] = {piece.block, piece.at, piece.row, piece.chunk, piece.begin, piece.end, plan.pieces};
  std::copy(std::begin(fields), std::end(fields), out);
}

const char* emulated_krylov(const char* name, const KrylovCall* call) {
  int pass = 0;
  while (std::strcmp(name, kKrylovPasses[pass])) ++pass;
  return krylov_cuda(static_cast<KrylovPass>(pass), *call);
}
std::int64_t emulated_krylov_workspace_doubles(std::int64_t B, std::int64_t N, std::int64_t most) {
  return krylov_workspace_doubles(B, N, most);
}
std::int64_t emulated_krylov_call_bytes() { return sizeof(KrylovCall); }
std::int64_t emulated_krylov_sample_bytes() { return sizeof(KrylovSample); }
std::int64_t emulated_krylov_counts() { return kKrylovCounts; }
std::int64_t emulated_krylov_most_vectors() { return kMostVectors; }

int emulated_device_count() { return cuda_device_count(); }
void emulated_choose_schedule(int schedule) { emulation::schedule = schedule; }
std::int64_t emulated_launches() { return emulation::launches; }

}  // extern "C"
