// The slab sketch of rows that land on known rows of a matrix: an embedding's gradient, of which only the rows touched
// cost anything. One signed, XOR-addressed copy per row and column block.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

template <class T>
void add_row(const SketchEmbeddingArgs& args, int64_t t, float* out) {
  const SlabPlan& plan = args.plan;
  const T* x = row_of<T>(args.x, t);
  const int64_t row = args.row[t];
  const int64_t row_block = row / plan.slab_rows, in_block = row % plan.slab_rows;
  const int64_t slab_size = plan.slab_rows * plan.slab_cols;
  for (int64_t col_block = 0; col_block < plan.n_col_blocks; ++col_block) {
    const int64_t pair = row_block * plan.n_col_blocks + col_block;
    const int64_t c0 = col_block * plan.slab_cols;
    const int64_t n = min64(plan.cols - c0, plan.slab_cols);
    const int64_t col_xor = plan.pair_col[pair];
    const float sign = args.row_sign[t] * plan.pair_sign[pair];
    float* dst = out + plan.pair_slab[pair] * slab_size + (in_block ^ plan.pair_row[pair]) * plan.slab_cols;
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
      float v[8];
      for (int i = 0; i < 8; ++i) v[i] = to_float(x[c0 + j + i]) * sign;
      if (plan.col_sign) store8(v, load8(v) * load8(plan.col_sign + c0 + j));
      float* to = dst + (j ^ col_xor);
      store8(to, load8(to) + load8(v));
    }
    for (; j < n; ++j) {
      const float v = to_float(x[c0 + j]) * sign;
      dst[j ^ col_xor] += plan.col_sign ? v * plan.col_sign[c0 + j] : v;
    }
  }
}

}  // namespace

void sketch_embedding(const SketchEmbeddingArgs& args) {
  with_dtype(args.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(args.n_segments, args.n_threads, [&](int64_t s) {
      for (int64_t t = args.offsets[s]; t < args.offsets[s + 1]; ++t)
        add_row<T>(args, t, args.out + s * args.out_stride);
    });
  });
}

}  // namespace cropi::CROPI_ISA
