// Python glue of `project`: see bindings/cpu.cpp.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace cropi;

namespace {

// x: (address, rows, cols, row stride, dtype code); y: address of [rows, dim].
void call(void (*kernel)(const ProjectArgs&), const py::tuple& x, uint64_t offset, uint32_t k0, uint32_t k1,
          int64_t dim, int64_t nnz, uint32_t keep, bool gaussian, float scale, uintptr_t y, int64_t y_stride,
          int threads) {
  const MatrixView view{reinterpret_cast<const void*>(x[0].cast<uintptr_t>()), x[1].cast<int64_t>(),
                        x[2].cast<int64_t>(), x[3].cast<int64_t>(), static_cast<DType>(x[4].cast<int>())};
  const ProjectArgs args{view,     offset, Key{k0, k1}, dim, nnz, keep, gaussian, scale, reinterpret_cast<float*>(y),
                         y_stride, threads};
  py::gil_scoped_release release;
  kernel(args);
}

}  // namespace

void bind_project(py::module_& m) {
  m.def("project",
        [](const std::string& kind, bool adjoint, const py::tuple& x, uint64_t offset, uint32_t k0, uint32_t k1,
           int64_t dim, int64_t nnz, uint32_t keep, float scale, uintptr_t y, int64_t y_stride, int threads) {
          const Kernels& k = kernels();
          const bool sparse = kind == "sparse";
          const auto kernel = sparse ? (adjoint ? k.project_sparse_adjoint : k.project_sparse)
                                     : (adjoint ? k.project_dense_adjoint : k.project_dense);
          call(kernel, x, offset, k0, k1, dim, nnz, keep, kind == "gaussian", scale, y, y_stride, threads);
        });

  m.def("project_csr",
        [](uintptr_t value, uintptr_t column, uintptr_t start, bool wide_value, bool wide_index, int64_t rows,
           int64_t cols, int64_t n_values, int64_t row_stride, uint64_t offset, uint32_t k0, uint32_t k1, int64_t dim,
           int64_t nnz, uint32_t keep, double scale, uintptr_t y, uintptr_t bucket, uintptr_t count, int threads) {
          const ProjectCsrArgs args{reinterpret_cast<const void*>(value),
                                    reinterpret_cast<const void*>(column),
                                    reinterpret_cast<const void*>(start),
                                    wide_value,
                                    wide_index,
                                    rows,
                                    cols,
                                    n_values,
                                    row_stride,
                                    offset,
                                    Key{k0, k1},
                                    dim,
                                    nnz,
                                    keep,
                                    scale,
                                    reinterpret_cast<void*>(y),
                                    reinterpret_cast<int32_t*>(bucket),
                                    reinterpret_cast<int64_t*>(count),
                                    threads};
          py::gil_scoped_release release;
          kernels().project_csr(args);
        });
}
