// The plain structs that host code and kernels share: what one solver step reads and writes.
//
// Notation: B samples, T blocks per sample, D features per block, M ring slots (memory + 1).
// Age a counts back from the newest row (a = 0); slot(a) = (head - a) mod M. The difference of age a is
// y_a = r_a - r_{a+1} and s_a = z_a - z_{a+1}; its Gram entries are kept under slot(a), so they never move.
#pragma once
#include <cstdint>

#include "scalar.h"

namespace pydeqsolve {

constexpr int kMaxSlots = 65;  // memory <= 64 natively; a longer one takes the PyTorch reference

enum class Kind : int { kAndersonII = 0, kAndersonI = 1, kBroydenGood = 2, kBroydenBad = 3 };
enum class Coupling : int { kJoint = 0, kIndependent = 1, kCausal = 2 };
enum class Norm : int { kSquares = 0, kMax = 1 };

// What becomes of one block in this step.
enum Mode : std::uint8_t {
  kKeep = 0,    // z' = z: finished, or not wanted
  kMix = 1,     // z' = f - sum_a gamma_a (f_a - f_{a+1}): the accelerated step
  kReject = 2,  // z' = f of age 1: the newest row made the residual blow up
  kPlain = 3,   // z' = f: Picard, also the start after a restart
  kAccept = 4,  // z' = f without damping: a leading block that is done
};

// Which rows of the batch take part. `rows` maps the n samples at hand to the B samples of the history.
struct Rows {
  std::int64_t n;              // samples at hand
  std::int64_t blocks;         // T
  std::int64_t features;       // D
  const std::int64_t* rows;    // (n,) or null for 0..n-1
  const std::uint8_t* wanted;  // (n, T) or null for all
};

// The history of all samples. R and F hold raw rows, not differences: a row is written once and never moved. R is
// rounded to the storage type (`kept`), and so below float32 are the residuals that the Gram matrices and right-hand
// sides are made of; squares and norms are those of f - z as it is.
template <class Scalar>
struct History {
  int slots;  // M
  int head;   // slot of the newest row
  Kind kind;
  std::int64_t sample_stride, slot_stride;  // of R and F, entries
  Scalar* R;                                // (B, M, T*D) residuals r = f - z, any order of samples and slots in memory
  Scalar* F;                                // (B, M, T*D) values f
  double* gram;         // (B, T, M, M) w_a . y_b by slots, w = y for type II and bad, s for type I and good
  double* steps_gram;   // (B, T, M, M) s_a . s_b by slots, kind good only, else null
  double* rhs;          // (B, T, M) w_a . r_0 by age
  double* squares;      // (B, T, 2) r_0 . r_0 and f . f of the newest row
  std::int32_t* count;  // (B, T) valid rows, the newest included
  double eps;           // unit of rounding of the state's dtype
};

// Pass 1: r = f - z into the ring, the new Gram row, the right-hand side, the norms. f, z (n, T, D);
// norms (n, T, 2): of r and of f, as sums of squares or as maxima.
template <class Scalar>
void measure_cpu(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z, double* norms,
                 Norm norm, int threads);

// The small systems: gamma (n, T, M) by age, from the Gram summed as the coupling says. dropped (n, T):
// differences left out because they depend on newer ones.
// Forgets the history of blocks that are rejected, and all but the newest row of blocks that take a plain step.
template <class Scalar>
void weights_cpu(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                 const std::uint8_t* mode, double* gamma, std::int32_t* dropped, int threads);

// Pass 2: the next iterate. z, z_next (n, T, D); mode (n, T); beta is the damping.
template <class Scalar>
void mix_cpu(const Rows& rows, const History<Scalar>& history, const double* gamma, const std::uint8_t* mode,
             double beta, const Scalar* z, Scalar* z_next, int threads);

// What the second half of a step takes besides the history.
struct Update {
  Coupling coupling;
  double ridge;
  double beta;
  // Iterates that are left behind as a sample's best (Record) are copied from before (n, T, D) to best (B, T, D), both
  // of the history's scalar; null: not copied.
  const void* before = nullptr;
  void* best = nullptr;
};
struct Record;     // judge.h
struct Judgement;  // judge.h
struct Counts;     // judge.h

// A whole step: the passes above with the judgement between them, table (n,), which fills mode (n, T). A sample whose
// rows fit in a core's cache passes through all of them before the next one is read, so that each row is read once.
template <class Scalar>
Counts step_cpu(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z,
                const Judgement& rule, Record* table, const Update& update, std::uint8_t* mode, Scalar* z_next,
                int threads);

// The first three on the current CUDA device, in order on `stream`; they neither allocate nor wait. partial is
// workspace of partial_doubles() doubles. Each returns null, or what the launch reported.
template <class Scalar>
const char* measure_cuda(const Rows& rows, const History<Scalar>& history, const Scalar* f, const Scalar* z,
                         double* norms, Norm norm, double* partial, void* stream);
template <class Scalar>
const char* weights_cuda(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                         const std::uint8_t* mode, double* gamma, std::int32_t* dropped, double* workspace,
                         void* stream);
template <class Scalar>
const char* mix_cuda(const Rows& rows, const History<Scalar>& history, const double* gamma, const std::uint8_t* mode,
                     double beta, const Scalar* z, Scalar* z_next, void* stream);
// weights_cuda and mix_cuda in one launch where every block has a small system of its own, else one after the other.
template <class Scalar>
const char* advance_cuda(const Rows& rows, const History<Scalar>& history, Coupling coupling, double ridge,
                         const std::uint8_t* mode, double* gamma, std::int32_t* dropped, double beta, const Scalar* z,
                         Scalar* z_next, double* workspace, void* stream);
// judge_all on the device, but for the counts: norms (n, T, 2), dropped (n, T) or null, table (n,), mode (n, T).
const char* judge_cuda(std::int64_t n, std::int64_t T, const double* norms, const std::int32_t* dropped, Record* table,
                       const Judgement& rule, std::uint8_t* mode, void* stream);
// Copies `bytes` of each sample that was left behind: to[rows[i]] = from[i]; rows (n,).
const char* keep_cuda(std::int64_t n, std::int64_t bytes, const Record* table, const std::int64_t* rows,
                      const void* from, void* to, void* stream);
std::int64_t partial_doubles(const Rows& rows, int slots);
int cuda_device_count();  // 0 without a driver

const char* cpu_isa();                  // "portable", "avx2" or "avx512"
bool choose_cpu_isa(const char* name);  // for tests; false when this processor or build lacks it

}  // namespace pydeqsolve
