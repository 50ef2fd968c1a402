#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#  include <dlfcn.h>
#  include <pthread.h>
#endif

namespace cropi {
namespace {

struct Job {
  int64_t n_tasks;
  void (*fn)(void*, int64_t);
  void* ctx;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  void work() {
    try {
      for (int64_t task = next++; task < n_tasks && !failed; task = next++) fn(ctx, task);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

// The OpenMP runtime that torch has loaded, if any: its threads spin for some milliseconds after every operation of
// torch, and threads of ours would share the cores with them (measured: 19.5 ms for a call that takes 16 to 18).
// GOMP_parallel is what compilers emit calls of; the LLVM and Intel runtimes have it too. It is looked up among what
// libtorch links: wheels for aarch64 keep it to themselves, and other packages bring runtimes of their own.
using Gomp = void (*)(void (*fn)(void*), void* ctx, unsigned team, unsigned flags);

Gomp openmp() {
#if defined(__SANITIZE_THREAD__)
  return nullptr;  // ThreadSanitizer does not see how libgomp's threads wait for each other: ours it sees
#elif defined(__unix__) || defined(__APPLE__)
  static const Gomp found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Gomp>(dlsym(torch ? torch : RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return found;
#else
  return nullptr;
#endif
}

// Threads that sleep between jobs. Starting one for every call took 90 us, a tenth of a small layer's sketch.
class Pool {
 public:
  // False if another job has the pool: two Python threads may call at the same time.
  bool run(Job* job, int helpers) {
    std::unique_lock<std::mutex> one_job(one_job_, std::try_to_lock);
    if (!one_job) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {
        // No more threads, or no memory for one: those that run, and this one, do all tasks.
      }
      job_ = job;
      seats_ = helpers;
    }
    wake_.notify_all();
    job->work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // who has not woken up by now is not waited for
    done_.wait(lock, [this] { return working_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex one_job_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int size_ = 0, seats_ = 0, working_ = 0;
};

std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of the threads: it starts a pool anew, and OpenMP does not survive a fork at all.
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = nullptr;
  forked = true;
});
#endif

// Never freed: its threads may still sleep when the process ends.
Pool* the_pool() {
  Pool* found = pool;
  if (found) return found;
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return made;
  delete made;  // another thread was first
  return found;
}

void run_on_new_threads(Job* job, int helpers) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(size_t(helpers));
    for (int i = 0; i < helpers; ++i) threads.emplace_back([job] { job->work(); });
  } catch (const std::exception&) {
    // Of memory too: a thread that runs and is not waited for would end the process.
  }
  job->work();
  for (auto& thread : threads) thread.join();
}

}  // namespace

void parallel_for(int64_t n_tasks, int n_threads, void (*fn)(void*, int64_t), void* ctx) {
  const int needed = n_threads < n_tasks ? n_threads : int(n_tasks);
  const Gomp parallel = forked ? nullptr : openmp();
  Job job{n_tasks, fn, ctx};
  if (needed <= 1)
    job.work();
  else if (parallel)  // all threads, as torch does: a smaller team would end the others
    parallel([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, unsigned(n_threads), 0);
  else if (!the_pool()->run(&job, needed - 1))
    run_on_new_threads(&job, needed - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cropi
