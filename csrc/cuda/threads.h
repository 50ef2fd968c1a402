// A block of threads as the kernels see it, on a GPU and without one.
//
// A kernel is a struct with a `Shared` type and `operator()(Block, Shared&)`. Its body is a sequence of phases:
// `threads.each(f)` runs f(thread, state) for every thread and `threads.sync()` parts two phases. On a GPU that is the
// body of a thread and a barrier; on the host it is a loop over the threads, so that the very same code, its indices,
// its shared memory and the order of its sums can be tested where there is no GPU.
#pragma once
#include <cstdint>

#include "cropi/philox.h"

#if defined(__CUDACC__)
#  define CROPI_UNROLL _Pragma("unroll")
#else
#  define CROPI_UNROLL
#endif

namespace cropi::gpu {

struct Block {
  int64_t x, y, z;
};

// `State` is what a thread keeps in registers from phase to phase.
template <int kThreads, class State>
struct Threads {
#if defined(__CUDA_ARCH__)
  State state;
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    f(int(threadIdx.x), state);
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
#else
  State state[kThreads];
  template <class F>
  CROPI_HD void each(F&& f) {
    for (int i = 0; i < kThreads; ++i) f(i, state[i]);
  }
  CROPI_HD void sync() {}
#endif
};

struct Nothing {};

// x, of which the compiler no longer knows that it is the same as before: what follows from it is computed again and
// not kept in registers from stage to stage.
CROPI_HD int recomputed(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

CROPI_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CROPI_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
CROPI_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two roundings everywhere: a compiler may not make one of them.
CROPI_HD float scaled_sum(float y, float scale, float x) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(y, __fmul_rn(scale, x));
#else
  const volatile float product = scale * x;
  return y + product;
#endif
}

}  // namespace cropi::gpu
