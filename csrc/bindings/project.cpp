// Python glue of `project`: see bindings/cpu.cpp.
#include "bindings/arguments.h"

namespace py = pybind11;
using namespace cropi;

void bind_project(py::module_& m) {
  // sparse: one of the sparse kinds; gaussian: of the dense ones; y: address of [rows, dim].
  m.def("project",
        [](bool sparse, bool gaussian, bool adjoint, const py::tuple& x, uint64_t offset, uint32_t k0, uint32_t k1,
           int64_t dim, int64_t nnz, uint32_t keep, float scale, uintptr_t y, int64_t y_stride, int threads) {
          const Kernels& k = kernels();
          const auto kernel = sparse ? (adjoint ? k.project_sparse_adjoint : k.project_sparse)
                                     : (adjoint ? k.project_dense_adjoint : k.project_dense);
          call(kernel, ProjectArgs{matrix(x), offset, Key{k0, k1}, dim, nnz, keep, gaussian, scale, ptr<float>(y),
                                   y_stride, threads});
        });

  m.def("project_csr",
        [](uintptr_t value, uintptr_t column, uintptr_t start, bool wide_value, bool wide_index, int64_t rows,
           int64_t cols, int64_t n_values, int64_t row_stride, uint64_t offset, uint32_t k0, uint32_t k1, int64_t dim,
           int64_t nnz, uint32_t keep, double scale, uintptr_t y, uintptr_t bucket, uintptr_t count, int threads) {
          call(kernels().project_csr,
               ProjectCsrArgs{ptr<const void>(value), ptr<const void>(column), ptr<const void>(start), wide_value,
                              wide_index, rows, cols, n_values, row_stride, offset, Key{k0, k1}, dim, nnz, keep, scale,
                              ptr<void>(y), ptr<int32_t>(bucket), ptr<int64_t>(count), threads});
        });
}
