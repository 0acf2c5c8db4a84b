// Spreads independent tasks over threads: OpenMP where the compiler has it, else std::thread.
//
// The module binds to the OpenMP runtime that is already loaded (PyTorch's), so both share one
// pool.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace ptq4adm {

inline const char* threading() {
#if defined(_OPENMP)
  return "OpenMP";
#else
  return "std::thread";
#endif
}

// Calls work(task, thread) for task = 0 .. tasks - 1; thread < threads. `work` must not throw.
template <typename Work>
void parallel_for(int64_t tasks, int64_t threads, const Work& work) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task, int64_t{0});
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
  for (int64_t task = 0; task < tasks; ++task) work(task, int64_t{omp_get_thread_num()});
#else
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t thread) {
    for (int64_t task = next++; task < tasks; task = next++) work(task, thread);
  };
  std::vector<std::thread> pool;
  try {
    for (int64_t thread = 1; thread < threads; ++thread) pool.emplace_back(run, thread);
  } catch (const std::system_error&) {
    // no more threads to be had: those that run share all tasks
  }
  run(0);
  for (std::thread& thread : pool) thread.join();
#endif
}

}  // namespace ptq4adm
