#include "cuda/launch.cuh"
#include "cuda/project_entry.h"

namespace cropi::gpu {

void run_sparse_on_device(cudaStream_t stream, const ProjectCall& call, bool adjoint, void* workspace) {
  run_sparse(DeviceLaunch{stream}, call, adjoint, workspace);
}

}  // namespace cropi::gpu
