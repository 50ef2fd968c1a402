// The adjoint of CountSketch and SJLT: every coordinate reads its buckets.
#include "cpu/project_sparse.h"

namespace cropi::CROPI_ISA {
namespace {

// x = or += the signed numbers of the buckets.
template <bool kFirst>
void read_run(float* x, int64_t n, const float* y, int64_t bucket, uint32_t low, const uint32_t* sign, uint64_t bit,
              bool whole_groups) {
  auto one = [&](int64_t i) {
    const float value = flip_sign(y[(bucket + i) ^ int64_t(low)], bit_of(sign, bit + uint64_t(i)));
    x[i] = kFirst ? value : x[i] + value;
  };
  int64_t i = 0;
  const int64_t head = whole_groups ? min64(n, int64_t(-bit & (kGroup - 1))) : n;
  for (; i < head; ++i) one(i);
  const Swap swap(low);
  for (; i + kGroup <= n; i += kGroup) {
    const uint32_t s = group_bits(sign, bit + uint64_t(i));
    for (int64_t v = 0; v < kGroup; v += kLanes) {
      const Vec value = flip_signs(swap(load(y + bucket + i + (v ^ swap.high))), s >> v);
      store(x + i + v, kFirst ? value : load(x + i + v) + value);
    }
  }
  for (; i < n; ++i) one(i);
}

}  // namespace

void project_sparse_adjoint(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  const Shape s = shape_of(args);
  const Blocks blocks(args, s);
  run_tasks(blocks.count, args.n_threads, [&](int64_t b) {
    const uint64_t begin = blocks.start(b), end = blocks.stop(b);
    Draws draws(args, s);
    draws.make(args, s, begin, end);
    for (int64_t row = 0; row < args.x.rows; ++row) {
      float* x = static_cast<float*>(const_cast<void*>(args.x.data)) + row * args.x.row_stride;
      const float* y = args.y + row * args.y_stride;
      for (int64_t j = 0; j < args.nnz; ++j)
        for_runs(draws, s, j, begin, end, [&](uint64_t p, int64_t n, int64_t bucket, uint32_t low) {
          const auto read = j == 0 ? read_run<true> : read_run<false>;
          read(x + (p - args.offset), n, y + j * s.width, bucket, low, draws.sign_bits(j), p - draws.first,
               s.group == kGroup);
        });
      const uint32_t* keep = draws.keep_bits();
      float* to = x + (begin - args.offset);
      for (int64_t i = 0; i < int64_t(end - begin); ++i) {
        const bool kept = args.keep == kKeepAll || bit_of(keep, begin - draws.first + uint64_t(i));
        to[i] = kept ? args.scale * to[i] : 0.0f;
      }
    }
  });
}

}  // namespace cropi::CROPI_ISA
