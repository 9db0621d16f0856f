// Splits work over the machine's cores. With OpenMP the threads are those of the process's one libgomp, which torch
// uses as well, so no second pool spins against torch's; without it (sanitizer builds) each call starts its own.
#pragma once
#include <cstdint>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace pydeqsolve {
namespace {

#ifndef PYDEQSOLVE_BYTES_PER_THREAD
#define PYDEQSOLVE_BYTES_PER_THREAD (1 << 17)  // below this a thread costs more than it brings
#endif

// Calls body(begin, end) on ranges that cover 0..items-1. How many ranges there are never changes a result: every
// item is computed by itself.
template <class Body>
void parallel_for(std::int64_t items, std::int64_t bytes, int threads, const Body& body) {
  const std::int64_t useful = bytes / PYDEQSOLVE_BYTES_PER_THREAD + 1;
  std::int64_t parts = threads < useful ? threads : useful;
  if (parts > items) parts = items;
  if (parts <= 1) {
    body(std::int64_t{0}, items);
    return;
  }
#if defined(_OPENMP)
// All threads although some get nothing: for a smaller team libgomp ends the others, and torch starts them anew.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (std::int64_t p = 0; p < parts; ++p) body(items * p / parts, items * (p + 1) / parts);
#else
  std::vector<std::thread> workers;
  for (std::int64_t p = 1; p < parts; ++p) {
    workers.emplace_back([&body, items, parts, p] { body(items * p / parts, items * (p + 1) / parts); });
  }
  body(std::int64_t{0}, items / parts);
  for (auto& worker : workers) worker.join();
#endif
}

}  // namespace
}  // namespace pydeqsolve
