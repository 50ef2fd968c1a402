// Tasks over the OpenMP threads that torch runs on, found at run time, or over std::thread where there are none. Nothing
// is linked with OpenMP: a second runtime beside torch's made mixed loops ten times slower.
#pragma once
#include <cstdint>

namespace cropi {

// Calls fn(ctx, task) for task in [0, n_tasks), on up to n_threads threads; tasks are handed out in order.
// Results cannot depend on the thread count as long as every task writes memory that no other task touches.
// An exception in a task is rethrown here after all threads have stopped.
void parallel_for(int64_t n_tasks, int n_threads, void (*fn)(void*, int64_t), void* ctx);

}  // namespace cropi
