// Python glue: pointers come in as integers, already checked by cropi_kernels; the GIL is released around each kernel.
#include "bindings/arguments.h"
#include "cpu/levels.h"

namespace py = pybind11;
using namespace cropi;

void bind_project(py::module_& m);  // bindings/project.cpp

namespace {

// (rows, cols, slab rows, slab cols, row blocks, col blocks, row signs, col signs, pair row, col, slab, sign)
SlabPlan slab_plan(const py::tuple& t) {
  SlabPlan p;
  p.rows = t[0].cast<int64_t>();
  p.cols = t[1].cast<int64_t>();
  p.slab_rows = t[2].cast<int64_t>();
  p.slab_cols = t[3].cast<int64_t>();
  p.n_row_blocks = t[4].cast<int64_t>();
  p.n_col_blocks = t[5].cast<int64_t>();
  p.row_sign = ptr<const float>(t[6].cast<uintptr_t>());
  p.col_sign = ptr<const float>(t[7].cast<uintptr_t>());
  p.pair_row = ptr<const uint32_t>(t[8].cast<uintptr_t>());
  p.pair_col = ptr<const uint32_t>(t[9].cast<uintptr_t>());
  p.pair_slab = ptr<const uint32_t>(t[10].cast<uintptr_t>());
  p.pair_sign = ptr<const float>(t[11].cast<uintptr_t>());
  return p;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of cropi_kernels (private).";
  m.def("detected_level", &detected_level);
  m.def("current_level", &current_level);
  m.def("set_level", &set_level);
  m.def("cpu_words", [] {
    const CpuWords cpu = this_cpu();
    return py::make_tuple(cpu.leaf1_ecx, cpu.leaf7_ebx, cpu.extended_ecx, cpu.xcr0);
  });
  m.def("level_of", [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t extended_ecx, uint32_t xcr0) {
    return level_of(CpuWords{leaf1_ecx, leaf7_ebx, extended_ecx, xcr0});
  });

  m.def("philox", [](uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const Draw d = philox(Key{k0, k1}, c0, c1, c2, c3);
    return py::make_tuple(d.w[0], d.w[1], d.w[2], d.w[3]);
  });

  m.def("fold_columns",
        [](const py::tuple& in, uintptr_t out, int64_t width, uintptr_t offset, uintptr_t sign, int threads) {
          call(kernels().fold_columns, FoldArgs{matrix(in), ptr<void>(out), width, ptr<const uint32_t>(offset),
                                                ptr<const float>(sign), threads});
        });

  m.def("sketch_linear", [](const py::tuple& d, const py::tuple& a, const py::tuple& plan, int64_t n_segments,
                            uintptr_t offsets, uintptr_t out, int64_t out_stride, int64_t n_slabs, int threads) {
    call(kernels().sketch_linear,
         SketchLinearArgs{matrix(d), matrix(a), slab_plan(plan), n_segments, ptr<const int64_t>(offsets),
                          ptr<float>(out), out_stride, n_slabs, threads});
  });

  m.def("sketch_grouped", [](const py::tuple& d, const py::tuple& a, const py::tuple& plan, int64_t n_segments,
                             uintptr_t offsets, uintptr_t out, int64_t out_stride, int64_t n_slabs, int threads,
                             int64_t n_groups, int64_t first_row, int64_t row_step) {
    call(kernels().sketch_linear,
         SketchLinearArgs{matrix(d), matrix(a), slab_plan(plan), n_segments, ptr<const int64_t>(offsets),
                          ptr<float>(out), out_stride, n_slabs, threads, n_groups, first_row, row_step});
  });

  m.def("sketch_embedding", [](const py::tuple& x, uintptr_t row, uintptr_t row_sign, const py::tuple& plan,
                               int64_t n_segments, uintptr_t offsets, uintptr_t out, int64_t out_stride, int threads) {
    call(kernels().sketch_embedding,
         SketchEmbeddingArgs{matrix(x), ptr<const int64_t>(row), ptr<const float>(row_sign), slab_plan(plan),
                             n_segments, ptr<const int64_t>(offsets), ptr<float>(out), out_stride, threads});
  });

  m.def("norm_grad", [](const py::tuple& x, const py::tuple& dy, bool centered, float eps, int64_t n_segments,
                        uintptr_t offsets, uintptr_t weight, uintptr_t bias, int threads) {
    call(kernels().norm_grad, NormGradArgs{matrix(x), matrix(dy), centered, eps, n_segments,
                                           ptr<const int64_t>(offsets), ptr<float>(weight), ptr<float>(bias), threads});
  });

  m.def("rms_norm", [](const py::tuple& x, uintptr_t weight, float eps, uintptr_t y, uintptr_t scale, int threads) {
    call(kernels().rms_norm,
         RmsNormArgs{matrix(x), ptr<const void>(weight), eps, ptr<void>(y), ptr<float>(scale), threads});
  });

  m.def("rms_norm_backward", [](const py::tuple& dy, const py::tuple& x, uintptr_t weight, uintptr_t scale,
                                uintptr_t dx, int64_t n_segments, uintptr_t offsets, uintptr_t sums, int threads) {
    call(kernels().rms_norm_backward,
         RmsNormBackwardArgs{matrix(dy), matrix(x), ptr<const void>(weight), ptr<const float>(scale), ptr<void>(dx),
                             n_segments, ptr<const int64_t>(offsets), ptr<float>(sums), threads});
  });

  m.def("swiglu", [](const py::tuple& gate, const py::tuple& up, uintptr_t out, int threads) {
    call(kernels().swiglu, SwigluArgs{matrix(gate), matrix(up), ptr<void>(out), threads});
  });

  m.def("swiglu_backward", [](const py::tuple& dh, const py::tuple& gate, const py::tuple& up, uintptr_t dgate,
                              uintptr_t dup, int threads) {
    call(kernels().swiglu_backward,
         SwigluBackwardArgs{matrix(dh), matrix(gate), matrix(up), ptr<void>(dgate), ptr<void>(dup), threads});
  });

  m.def("sketch_vector", [](uintptr_t gradient, int64_t n_segments, int64_t size, int64_t gradient_stride,
                            uintptr_t blocks, int64_t block, uintptr_t sign, uintptr_t out, int64_t out_stride) {
    call(kernels().sketch_vector,
         SketchVectorArgs{ptr<const float>(gradient), n_segments, size, gradient_stride, ptr<const int64_t>(blocks),
                          block, ptr<const int8_t>(sign), ptr<float>(out), out_stride});
  });

  m.def("head_logits", [](const py::tuple& hidden, const py::tuple& head, uintptr_t bias, uintptr_t out,
                          int64_t out_stride, int threads) {
    call(kernels().head_logits,
         HeadLogitsArgs{matrix(hidden), matrix(head), ptr<const float>(bias), ptr<float>(out), out_stride, threads});
  });

  m.def("times_head", [](const py::tuple& dz, const py::tuple& head, const py::tuple& out, int threads) {
    call(kernels().times_head, TimesHeadArgs{matrix(dz), matrix(head), matrix(out), threads});
  });

  m.def("logprob_rows", [](const py::tuple& logits, uintptr_t target, float temperature, float softcap,
                           uintptr_t logprob, uintptr_t top, uintptr_t log_sum, uintptr_t entropy, int threads) {
    call(kernels().logprob_rows,
         LogprobRowsArgs{matrix(logits), ptr<const int64_t>(target), temperature, softcap, ptr<float>(logprob),
                         ptr<float>(top), ptr<float>(log_sum), ptr<float>(entropy), threads});
  });

  m.def("logprob_rows_backward", [](const py::tuple& logits, uintptr_t target, uintptr_t grad, uintptr_t logprob,
                                    uintptr_t top, uintptr_t log_sum, float temperature, float softcap, int threads) {
    call(kernels().logprob_rows_backward,
         LogprobBackwardArgs{matrix(logits), ptr<const int64_t>(target), ptr<const float>(grad),
                             ptr<const float>(logprob), ptr<const float>(top), ptr<const float>(log_sum), temperature,
                             softcap, threads});
  });

  m.def("row_products", [](uintptr_t rows, int kind, int64_t n_rows, int64_t dim, int64_t row_bytes, uintptr_t scale,
                           int64_t n_blocks, uintptr_t directions, int64_t n_directions, uintptr_t out, int threads) {
    call(kernels().row_products,
         RowProductsArgs{ptr<const void>(rows), static_cast<RowKind>(kind), n_rows, dim, row_bytes,
                         ptr<const float>(scale), n_blocks, ptr<const float>(directions), n_directions,
                         ptr<double>(out), threads});
  });

  bind_project(m);
}
