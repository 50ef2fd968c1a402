#include "cpu/parallel.h"

#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace cropi {

void parallel_for(int64_t n_tasks, int n_threads, void (*fn)(void*, int64_t), void* ctx) {
  if (n_threads > n_tasks) n_threads = int(n_tasks);
  if (n_threads <= 1) {
    for (int64_t task = 0; task < n_tasks; ++task) fn(ctx, task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  auto work = [&] {
    try {
      for (int64_t task = next++; task < n_tasks && !failed; task = next++) fn(ctx, task);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(size_t(n_threads - 1));
  try {
    for (int i = 1; i < n_threads; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: those that run, and this one, do all tasks
  }
  work();
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace cropi
