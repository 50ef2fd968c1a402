// A grid of blocks on a GPU: see threads.h for what a kernel is.
#pragma once
#include <cuda_runtime.h>

#include "cuda/threads.h"

namespace cropi::gpu {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kBlockThreads, Kernel::kBlocksPerMultiprocessor)
    run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(Block{blockIdx.x, blockIdx.y, blockIdx.z}, shared);
}

struct DeviceLaunch {
  cudaStream_t stream;
  template <class Kernel>
  void operator()(int64_t nx, int64_t ny, int64_t nz, const Kernel& kernel) const {
    run_kernel<<<dim3(unsigned(nx), unsigned(ny), unsigned(nz)), Kernel::kBlockThreads, 0, stream>>>(kernel);
  }
};

}  // namespace cropi::gpu
