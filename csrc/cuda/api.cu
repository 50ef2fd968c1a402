#include "cuda/api.h"

#include "cuda/launch.cuh"
#include "cuda/project_run.h"

namespace cropi::gpu {
void run_sparse_on_device(cudaStream_t stream, const ProjectCall& call, bool adjoint, void* workspace);
void run_dense_on_device(cudaStream_t stream, const ProjectCall& call, bool adjoint, void* workspace);
}  // namespace cropi::gpu

using namespace cropi::gpu;

int cropi_abi() { return 1; }
const char* cropi_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
int64_t cropi_project_workspace(const ProjectCall* call, int dense) { return PartPlan(*call, dense).bytes(*call); }

int cropi_project(const ProjectCall* call, int dense, int adjoint, void* workspace, void* stream) {
  cudaGetLastError();  // what others left behind is not ours to report
  const auto run = dense ? run_dense_on_device : run_sparse_on_device;
  run(static_cast<cudaStream_t>(stream), *call, adjoint, workspace);
  return int(cudaGetLastError());
}
