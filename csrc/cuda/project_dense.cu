#include "cuda/launch.cuh"
#include "cuda/project_entry.h"

namespace cropi::gpu {

void run_dense_on_device(cudaStream_t stream, const ProjectCall& call, bool adjoint, void* workspace) {
  run_dense(DeviceLaunch{stream}, call, adjoint, workspace);
}

}  // namespace cropi::gpu
