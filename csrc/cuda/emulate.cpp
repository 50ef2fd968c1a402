// The CUDA kernels on the host, block after block: what tests/kernels/test_project_cuda.py holds to the CPU kernels.
// Never part of a build that is shipped. Shared memory starts as NaN, so that a read before a write shows.
#include <cstring>
#include <memory>
#include <type_traits>

#include "cuda/project_entry.h"

namespace cropi::gpu {
namespace {

struct HostLaunch {
  template <class Kernel>
  void operator()(int64_t nx, int64_t ny, int64_t nz, const Kernel& kernel) const {
    auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t z = 0; z < nz; ++z)
      for (int64_t y = 0; y < ny; ++y)
        for (int64_t x = 0; x < nx; ++x) {
          std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(*shared));
          kernel(Block{x, y, z}, *shared);
        }
  }
};

}  // namespace
}  // namespace cropi::gpu

using namespace cropi::gpu;

int cropi_abi() { return 1; }
const char* cropi_error_text(int) { return "none"; }
int64_t cropi_project_workspace(const ProjectCall* call, int dense) { return PartPlan(*call, dense).bytes(*call); }

int cropi_project(const ProjectCall* call, int dense, int adjoint, void* workspace, void*) {
  if (dense)
    run_dense(HostLaunch{}, *call, adjoint, workspace);
  else
    run_sparse(HostLaunch{}, *call, adjoint, workspace);
  return 0;
}
