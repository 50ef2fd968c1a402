// The adjoint of CountSketch and SJLT: every coordinate reads its buckets.
#include "cpu/project_sparse.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr uint64_t kPiece = 1024;  // coordinates that stay in L1 until all their buckets are read

// x = or += the signed numbers of the buckets.
template <bool kFirst, bool kWhole>
void read_run(float* x, int64_t n, const float* y, int64_t bucket, uint32_t low, const uint32_t* sign, uint64_t bit,
              int64_t group) {
  auto one = [&](int64_t i) {
    const float value = flip_sign(y[(bucket + i) ^ int64_t(low)], bit_of(sign, bit + uint64_t(i)));
    x[i] = kFirst ? value : x[i] + value;
  };
  int64_t i = 0;
  const int64_t head = min64(n, -bucket & (group - 1));  // as in add_run
  for (; i < head; ++i) one(i);
  const Swap swap(low);
  for (; i + kGroup <= n; i += kGroup)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kGroup; v += kLanes) {
      const uint32_t s = vector_bits<kWhole>(sign, bit + uint64_t(i), v);
      const Vec value = flip_signs(swap(load(y + bucket + i + (v ^ swap.high))), s);
      store(x + i + v, kFirst ? value : load(x + i + v) + value);
    }
  for (; i < n; ++i) one(i);
}

// x *= scale, 0 where a coordinate is not kept.
template <bool kKeep>
void finish(float* x, int64_t n, float scale, const uint32_t* keep, uint64_t bit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i) * scale;
    store(x + i, kKeep ? keep_lanes(v, vector_bits<false>(keep, bit + uint64_t(i), 0)) : v);
  }
  for (; i < n; ++i) x[i] = kKeep && !bit_of(keep, bit + uint64_t(i)) ? 0.0f : scale * x[i];
}

}  // namespace

void project_sparse_adjoint(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  const Shape s = shape_of(args);
  const Blocks blocks(args, s);
  run_tasks(blocks.count, args.n_threads, [&](int64_t b) {
    const uint64_t end = blocks.stop(b);
    Draws draws(args, s);
    draws.make(args, s, blocks.start(b), end);
    for (int64_t row = 0; row < args.x.rows; ++row) {
      float* x = own_row_of<float>(args.x, row);
      const float* y = args.y + row * args.y_stride;
      for (uint64_t begin = blocks.start(b), stop; begin < end; begin = stop) {
        stop = begin / kPiece * kPiece + kPiece;
        if (stop > end) stop = end;
        for (int64_t j = 0; j < args.nnz; ++j)
          for_runs(draws, s, j, begin, stop, [&](uint64_t p, int64_t n, int64_t bucket, uint32_t low) {
            const bool whole = s.group == kGroup;
            const auto read = j == 0 ? (whole ? read_run<true, true> : read_run<true, false>)
                                     : (whole ? read_run<false, true> : read_run<false, false>);
            read(x + (p - args.offset), n, y + j * s.width, bucket, low, draws.sign_bits(j), p - draws.first, s.group);
          });
        const auto scale = args.keep < kKeepAll ? finish<true> : finish<false>;
        scale(x + (begin - args.offset), int64_t(stop - begin), args.scale, draws.keep_bits(), begin - draws.first);
      }
    }
  });
}

}  // namespace cropi::CROPI_ISA
