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
enum class Norm : int { kRms = 0, kL2 = 1, kMax = 2 };

// What becomes of one block in this step.
enum Mode : std::uint8_t {
  kKeep = 0,    // z' = z: finished, or not wanted
  kMix = 1,     // z' = f - sum_a gamma_a (f_a - f_{a+1}): the accelerated step
  kReject = 2,  // z' = f of age 1: the newest row made the residual blow up
  kPlain = 3,   // z' = f: Picard, also the start after a restart
  kAccept = 4,  // z' = f without damping: a leading block that is done
};

// The history of B samples, and how a solver uses it: constant in a solve but for `head`. R and F hold raw rows, not
// differences: a row is written once and never moved. R is rounded to the storage type (`kept`), and so below float32
// are the residuals that the Gram matrices and right-hand sides are made of; squares and norms are those of f - z as it
// is.
struct Ring {
  Storage storage;  // of R, F and every state
  int slots;        // M
  int head;         // slot of the newest row
  Kind kind;
  Coupling coupling;
  double ridge, damping;
  double eps;                               // unit of rounding of the state's dtype
  std::int64_t samples, blocks, features;   // B, T, D
  std::int64_t sample_stride, slot_stride;  // of R and F, entries
  void* R;                                  // (B, M, T*D) residuals r = f - z, any order of samples and slots in memory
  void* F;                                  // (B, M, T*D) values f
  double* gram;         // (B, T, M, M) w_a . y_b by slots, w = y for type II and bad, s for type I and good
  double* steps_gram;   // (B, T, M, M) s_a . s_b by slots, kind good only, else null
  double* rhs;          // (B, T, M) w_a . r_0 by age
  double* squares;      // (B, T, 2) r_0 . r_0 and f . f of the newest row
  std::int32_t* count;  // (B, T) valid rows, the newest included
};

// What a judgement knows besides the records; constant in a solve.
struct Rule {
  double safeguard;  // growth of the residual at which an accelerated step is refused; 0 for solvers without any
  double eps;        // of the state's dtype
  double divisor;    // of sums of squares: entries of a sample, or of a block, for the root mean square, else 1
  Norm norm;
};

struct Sample;  // judge.h

// One call of a pass: what it reads and writes of the n samples at hand. Of the rest each pass reads what it names.
struct Call {
  Ring ring;
  Rule rule;
  std::int64_t n;
  const std::int64_t* rows;    // (n,) of the B samples, or null for 0..n-1
  const std::uint8_t* wanted;  // (n, T) or null for all
  const void* f;               // (n, T, D)
  const void* z;               // (n, T, D)
  double* norms;               // (n, T, 2) of r and of f: sums of squares, or maxima
  std::uint8_t* mode;          // (n, T) of Mode
  double* gamma;               // (n, T, M) weights by age
  std::int32_t* dropped;       // (n, T) differences left out because they depend on newer ones, or null
  void* z_next;                // (n, T, D)
  Sample* table;               // (n,)
  const void* before;          // (n, T, D) iterates before z: those left behind as a sample's best are copied
  void* best;                  // (B, T, D) to here; null: not copied
  double* workspace;           // of workspace_doubles() on a device
  void* stream;                // of a device
  int threads;                 // of the host
};

struct Counts {
  std::int64_t finished, left_behind;  // samples
};

// The passes of a step, once per instruction set and once for CUDA, where they go in order on `stream` and neither
// allocate nor wait. Each returns null, or what the launch reported.
struct Passes {
  // Pass 1, of f and z: r = f - z into the ring, the new Gram row, the right-hand side, the norms.
  const char* (*measure)(const Call&);
  // The small systems, of mode: gamma, from the Gram summed as the coupling says, and dropped. Forgets the history of
  // blocks that are rejected, and all but the newest row of blocks that take a plain step.
  const char* (*weights)(const Call&);
  // Pass 2, of mode, gamma and z: z_next.
  const char* (*mix)(const Call&);
  // `weights` and `mix`; on CUDA in one launch where every block has a small system of its own.
  const char* (*advance)(const Call&);
  // A whole step: `measure`, the judgement of the table, which fills mode, and `advance`. A sample whose rows fit in a
  // core's cache passes through all of them before the next one is read, so that each row is read once. Null on CUDA.
  Counts (*step)(const Call&);
};

const Passes& cpu_passes();
const Passes& cuda_passes();

// judge_samples on the current device, but for the counts: of norms, dropped, table and mode.
const char* judge_cuda(const Call& call);
// Copies `bytes` of each sample that was left behind: to[rows[i]] = from[i]; rows (n,).
const char* keep_cuda(std::int64_t n, std::int64_t bytes, const Sample* table, const std::int64_t* rows,
                      const void* from, void* to, void* stream);
std::int64_t workspace_doubles(const Ring& ring, std::int64_t n);
int cuda_device_count();  // 0 without a driver

const char* cpu_isa();                  // "portable", "avx2" or "avx512"
bool choose_cpu_isa(const char* name);  // for tests; false when this processor or build lacks it

}  // namespace pydeqsolve
