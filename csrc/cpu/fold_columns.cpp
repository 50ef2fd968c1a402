// CountSketch of the columns of a matrix: divides the matrix work of sketch_linear by cols / width.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

template <class T>
void fold_row(const T* in, const FoldArgs& args, float* acc) {
  const int64_t cols = args.in.cols, width = args.width;
  std::memset(acc, 0, size_t(width) * 4);
  for (int64_t block = 0, c = 0; c < cols; ++block, c += width) {
    const int64_t offset = args.offset[block];
    const int64_t n = min64(cols - c, width);
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {  // groups of 8 stay together: the XOR is a multiple of 8
      float x[8];
      for (int i = 0; i < 8; ++i) x[i] = to_float(in[c + j + i]);
      float* dst = acc + (j ^ offset);
      store8(dst, load8(dst) + load8(x) * load8(args.sign + c + j));
    }
    for (; j < n; ++j) acc[j ^ offset] += args.sign[c + j] * to_float(in[c + j]);
  }
}

}  // namespace

void fold_columns(const FoldArgs& args) {
  with_dtype(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n_tasks = ceil_div(args.in.rows, kRowsPerTask);
    run_tasks(n_tasks, args.n_threads, [&](int64_t task) {
      Scratch acc(args.width);
      const int64_t begin = task * kRowsPerTask;
      const int64_t end = min64(begin + kRowsPerTask, args.in.rows);
      for (int64_t t = begin; t < end; ++t) {
        fold_row(row_of<T>(args.in, t), args, acc.data());
        T* out = static_cast<T*>(args.out) + t * args.width;
        for (int64_t j = 0; j < args.width; ++j) from_float(acc.data()[j], out + j);
      }
    });
  });
}

}  // namespace cropi::CROPI_ISA
