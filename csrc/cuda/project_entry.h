// cropi_project for any way to launch. Split by family, so that a compiler can work on both at once.
#pragma once
#include <type_traits>

#include "cuda/api.h"
#include "cuda/project_run.h"

namespace cropi::gpu {

template <class Launch>
void run_sparse(const Launch& launch, const ProjectCall& call, bool adjoint, void* workspace) {
  if (call.rows == 0 || call.n == 0) return;
  if (adjoint) return project_sparse_adjoint(launch, call);
  with_element(call.dtype,
               [&](auto* type) { project_sparse<std::remove_pointer_t<decltype(type)>>(launch, call, workspace); });
}

template <class Launch>
void run_dense(const Launch& launch, const ProjectCall& call, bool adjoint, void* workspace) {
  if (call.rows == 0 || call.n == 0) return;
  if (adjoint) return project_dense_adjoint(launch, call);
  with_element(call.dtype,
               [&](auto* type) { project_dense<std::remove_pointer_t<decltype(type)>>(launch, call, workspace); });
}

}  // namespace cropi::gpu
