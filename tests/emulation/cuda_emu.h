// Runs CUDA kernels on the CPU, so that they can be tested where there is no GPU and by sanitizers that GPUs lack.
//
// Every CUDA thread is a fiber with a stack of its own. A thread block runs by switching between its fibers at barriers
// and warp operations, in an order that `schedule` chooses; thread blocks run one after another. Shared memory is a
// heap block of exactly the size asked for, full of NaN.
//
// What is checked on top of results:
//   - a barrier that part of a thread block never reaches, or reaches on another line, ends the process (exit code 98);
//     so does a warp operation whose lanes do not all arrive with the same mask;
//   - under -fsanitize=thread fibers are threads to the sanitizer, and switching between them orders nothing. Only
//     __syncthreads, __syncwarp and the ends of kernels do, so a missing barrier is a reported race. Shuffles exchange
//     values but order no memory, as in CUDA. Neighbouring thread blocks use two sets of fibers: they race as well;
//   - under -fsanitize=address the sanitizer is told of every switch, and reads past shared memory are reported.
//
// Rules for kernels: launches through PYDEQSOLVE_LAUNCH, shared memory through PYDEQSOLVE_SHARED, _sync intrinsics
// only; no static shared memory, cooperative groups, CUB or inline PTX; thread blocks of whole warps.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks in x86-64 assembly and allocates them with mmap"
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
// The scheduler is not part of the program under test: its own reads and writes must not look like those of a fiber.
#define EMULATION_HIDDEN __attribute__((no_sanitize("thread"), noinline))

// The language, as far as the kernels use it.
#define PYDEQSOLVE_EMULATE_CUDA
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
struct Index3 {
  unsigned x, y, z;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxShared = 48 << 10;  // what a kernel gets without asking for more
constexpr std::size_t kStackSize = 256 << 10;
constexpr int kFiberSets = 2;

// 0: warps and lanes first to last, each as far as it can go; 1: last to first; others: random, this is the seed.
inline int schedule = 0;
inline std::int64_t launches = 0;
inline cudaError_t last_error = cudaSuccess;

enum class State { kRunning, kAtBarrier, kAtWarpOperation, kDone };
enum class Operation { kSync, kShuffle };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kDone;
  unsigned thread = 0;
  int lane = 0, warp = 0;
  const char* site = nullptr;  // where it waits
  unsigned mask = 0;           // of the warp operation it waits at
  Operation operation = Operation::kSync;
  std::uint64_t value = 0;  // given to, then received from, a shuffle
  int source = 0;           // lane whose value it asks for
  void* thread_sanitizer = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
};

// An address that the thread sanitizer knows as a barrier. Two take turns, so that a thread which is already past a
// barrier cannot release what a slower one has yet to acquire.
struct Barrier {
  char turns[2];
  int turn = 0;
};

struct Machine {
  Index3 grid{}, block{}, block_index{};
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  unsigned char* shared = nullptr;

  std::vector<Fiber> fibers;  // kFiberSets sets of kMaxThreads
  Fiber* first = nullptr;     // of the current set
  Fiber* current = nullptr;
  int threads = 0;
  std::uint64_t random = 1;
  void* scheduler_stack = nullptr;

  Barrier block_barrier, warp_barriers[kMaxThreads / kWarpSize];
  char start = 0, end = 0;  // of a kernel, for the thread sanitizer
  void* scheduler_thread = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  std::size_t scheduler_size = 0;
};
inline Machine machine;

EMULATION_HIDDEN inline void release([[maybe_unused]] char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}
EMULATION_HIDDEN inline void acquire([[maybe_unused]] char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

// Saves the registers a function must preserve and the stack pointer, and continues on another stack.
extern "C" void emulation_switch(void** from, void* to);
#define EMULATION_DEFINE_SWITCH            \
  asm(".text\n"                            \
      ".globl emulation_switch\n"          \
      ".type emulation_switch,@function\n" \
      "emulation_switch:\n"                \
      "  pushq %rbp\n"                     \
      "  pushq %rbx\n"                     \
      "  pushq %r12\n"                     \
      "  pushq %r13\n"                     \
      "  pushq %r14\n"                     \
      "  pushq %r15\n"                     \
      "  movq %rsp, (%rdi)\n"              \
      "  movq %rsi, %rsp\n"                \
      "  popq %r15\n"                      \
      "  popq %r14\n"                      \
      "  popq %r13\n"                      \
      "  popq %r12\n"                      \
      "  popq %rbx\n"                      \
      "  popq %rbp\n"                      \
      "  ret\n"                            \
      ".size emulation_switch,.-emulation_switch\n");

EMULATION_HIDDEN inline void switch_to_scheduler([[maybe_unused]] bool finished) {
  Fiber& self = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &self.fake_stack, machine.scheduler_bottom,
                                 machine.scheduler_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_thread, __tsan_switch_to_fiber_no_sync);
#endif
  emulation_switch(&self.stack_pointer, machine.scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
}

EMULATION_HIDDEN inline void resume(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackSize);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  emulation_switch(&machine.scheduler_stack, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// The first frame of every fiber.
EMULATION_HIDDEN inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  acquire(&machine.start);
  machine.body(machine.argument);
  machine.current->state = State::kDone;
  release(&machine.end);
  switch_to_scheduler(true);
  std::abort();
}

EMULATION_HIDDEN inline void prepare(Fiber& fiber, int thread) {
  if (!fiber.stack) {
    void* const stack =
        mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    fiber.stack = static_cast<char*>(stack);
#if defined(__SANITIZE_THREAD__)
    fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
  }
  // What emulation_switch pops: six registers, then the address of run_thread; above it the alignment a call leaves.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackSize - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.fake_stack = nullptr;
  fiber.state = State::kRunning;
  fiber.thread = static_cast<unsigned>(thread);
  fiber.lane = thread % kWarpSize;
  fiber.warp = thread / kWarpSize;
}

[[noreturn]] EMULATION_HIDDEN inline void report(const char* what) {
  std::fprintf(stderr, "EMULATION ERROR: %s in %s, thread block %u\n", what, machine.kernel, machine.block_index.x);
  std::map<std::string, int> where;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.first[i];
    char mask[32];
    std::snprintf(mask, sizeof mask, " with mask %08x", fiber.mask);
    where[fiber.state == State::kDone        ? std::string("have exited")
          : fiber.state == State::kAtBarrier ? std::string("wait for the thread block at ") + fiber.site
          : fiber.state == State::kRunning   ? std::string("run")
                                             : std::string("wait for the warp at ") + fiber.site + mask]++;
  }
  for (const auto& [state, count] : where) std::fprintf(stderr, "  %d threads %s\n", count, state.c_str());
  std::fflush(stderr);
  _exit(98);
}

// Lets the thread block pass its barrier if every thread waits there, on one line.
EMULATION_HIDDEN inline bool release_block() {
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.first[i];
    if (fiber.state != State::kAtBarrier || fiber.site != machine.first[0].site) return false;
  }
  for (int i = 0; i < machine.threads; ++i) machine.first[i].state = State::kRunning;
  machine.block_barrier.turn ^= 1;
  return true;
}

// The lanes of `mask` all wait at the operation of `fiber`.
EMULATION_HIDDEN inline bool complete(const Fiber& fiber, const Fiber* warp) {
  for (int l = 0; l < kWarpSize; ++l) {
    const Fiber& other = warp[l];
    if (!(fiber.mask >> l & 1)) continue;
    if (other.state != State::kAtWarpOperation || other.mask != fiber.mask || other.operation != fiber.operation ||
        other.site != fiber.site) {
      return false;
    }
  }
  return true;
}

// Carries out the operations that a warp's lanes wait for, as far as their masks are complete.
EMULATION_HIDDEN inline bool release_warp(int index) {
  Fiber* const warp = machine.first + index * kWarpSize;
  bool any = false;
  for (int i = 0; i < kWarpSize; ++i) {
    if (warp[i].state != State::kAtWarpOperation || !complete(warp[i], warp)) continue;
    const unsigned mask = warp[i].mask;
    std::uint64_t given[kWarpSize];
    for (int l = 0; l < kWarpSize; ++l) given[l] = warp[l].value;
    for (int l = 0; l < kWarpSize; ++l) {
      if (!(mask >> l & 1)) continue;
      const bool answered = mask >> warp[l].source & 1;
      if (warp[l].operation == Operation::kShuffle)
        warp[l].value = answered ? given[warp[l].source] : ~std::uint64_t{0};
      warp[l].state = State::kRunning;
    }
    if (warp[i].operation == Operation::kSync) machine.warp_barriers[index].turn ^= 1;
    any = true;
  }
  return any;
}

EMULATION_HIDDEN inline std::uint64_t random_number() {
  machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
  return machine.random >> 33;
}

// 0 … n-1 in the order of the schedule.
EMULATION_HIDDEN inline void arrange(int* order, int n) {
  for (int i = 0; i < n; ++i) order[i] = schedule == 1 ? n - 1 - i : i;
  if (schedule < 2) return;
  for (int i = n - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
}

// Runs one warp until its lanes wait for the thread block; a random schedule may turn to another warp before. Returns
// how many lanes have finished, or -1 if none could move.
EMULATION_HIDDEN inline int run_warp(int index) {
  int lanes[kWarpSize], finished = 0;
  bool moved = false;
  do {
    arrange(lanes, kWarpSize);
    for (const int lane : lanes) {
      Fiber& fiber = machine.first[index * kWarpSize + lane];
      if (fiber.state != State::kRunning) continue;
      resume(fiber);
      moved = true;
      finished += fiber.state == State::kDone;
    }
  } while (release_warp(index) && (schedule < 2 || random_number() % 4 != 0));
  return moved ? finished : -1;
}

EMULATION_HIDDEN inline void run_block() {
  const int warps = machine.threads / kWarpSize;
  machine.first = machine.fibers.data() + machine.block_index.x % kFiberSets * kMaxThreads;
  for (int i = 0; i < machine.threads; ++i) prepare(machine.first[i], i);
  int left = machine.threads, order[kMaxThreads / kWarpSize];
  while (left) {
    bool moved = true;
    while (moved) {
      moved = false;
      arrange(order, warps);
      for (int k = 0; k < warps; ++k) {
        const int finished = run_warp(order[k]);
        if (finished < 0) continue;
        left -= finished;
        moved = true;
      }
    }
    if (left && !release_block()) report("barrier not reached by all");
  }
}

template <class Body>
void call(void* body) {
  (*static_cast<Body*>(body))();
}

// One kernel launch; body runs one thread.
template <class Body>
void launch(unsigned grid, unsigned threads, std::size_t shared, const char* kernel, Body body) {
  if (!grid || grid > 0x7fffffffu || !threads || threads > kMaxThreads || shared > kMaxShared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (threads % kWarpSize) report("thread block of a broken warp");
  ++launches;
  if (machine.fibers.empty()) machine.fibers.resize(kFiberSets * kMaxThreads);
  machine.grid = {grid, 1, 1};
  machine.block = {threads, 1, 1};
  machine.kernel = kernel;
  machine.body = &call<Body>;
  machine.argument = &body;
  machine.threads = static_cast<int>(threads);
  machine.random = static_cast<std::uint64_t>(schedule);
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_thread = __tsan_get_current_fiber();
#endif
  // Freed after the launch, because to the sanitizer a free is a write.
  std::vector<unsigned char*> shared_memory(grid);
  for (unsigned b = 0; b < grid; ++b) {
    machine.block_index = {b, 0, 0};
    machine.shared = shared_memory[b] = static_cast<unsigned char*>(std::malloc(shared));
    if (shared) std::memset(machine.shared, 0xff, shared);
    release(&machine.start);
    run_block();
  }
  acquire(&machine.end);
  for (unsigned char* const memory : shared_memory) std::free(memory);
}

EMULATION_HIDDEN inline Index3 thread_index() { return {machine.current->thread, 0, 0}; }
EMULATION_HIDDEN inline Index3 block_index() { return machine.block_index; }
EMULATION_HIDDEN inline Index3 block_size() { return machine.block; }
EMULATION_HIDDEN inline Index3 grid_size() { return machine.grid; }
EMULATION_HIDDEN inline void* shared_memory() { return machine.shared; }

EMULATION_HIDDEN inline void sync_block(const char* site) {
  Fiber& self = *machine.current;
  char* const turn = &machine.block_barrier.turns[machine.block_barrier.turn];
  release(turn);
  self.site = site;
  self.state = State::kAtBarrier;
  switch_to_scheduler(false);
  acquire(turn);
}

EMULATION_HIDDEN inline void wait_for_warp(Operation operation, unsigned mask, const char* site) {
  Fiber& self = *machine.current;
  if (!(mask >> self.lane & 1)) report("warp operation by a lane that is not in its mask");
  self.operation = operation;
  self.mask = mask;
  self.site = site;
  self.state = State::kAtWarpOperation;
  switch_to_scheduler(false);
}

EMULATION_HIDDEN inline void sync_warp(const char* site, unsigned mask = 0xffffffffu) {
  Barrier& barrier = machine.warp_barriers[machine.current->warp];
  char* const turn = &barrier.turns[barrier.turn];
  release(turn);
  wait_for_warp(Operation::kSync, mask, site);
  acquire(turn);
}

EMULATION_HIDDEN inline double shuffle_xor(const char* site, unsigned mask, double value, int lanes) {
  Fiber& self = *machine.current;
  std::memcpy(&self.value, &value, sizeof value);
  self.source = self.lane ^ lanes;
  wait_for_warp(Operation::kShuffle, mask, site);
  std::memcpy(&value, &self.value, sizeof value);
  return value;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

#define EMULATION_TEXT_OF(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_OF(x)
#define EMULATION_SITE __FILE__ ":" EMULATION_TEXT(__LINE__)

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())
#define __syncthreads() emulation::sync_block(EMULATION_SITE)
#define __syncwarp(...) emulation::sync_warp(EMULATION_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(...) emulation::shuffle_xor(EMULATION_SITE, __VA_ARGS__)
#define PYDEQSOLVE_SHARED(name) double* const name = static_cast<double*>(emulation::shared_memory())
#define PYDEQSOLVE_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  (static_cast<void>(stream), emulation::launch(grid, threads, shared, #kernel, [=] { kernel(__VA_ARGS__); }))
