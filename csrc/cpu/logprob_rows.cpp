// The row work of linear_logprob, on logits that a matrix product has just written.
//
// Forward: one pass over the row. A running maximum is corrected block by block, a block being small enough that its
// second visit (the exponentials) finds it in L1. The target's own term is left out of the vector sum and added at
// the end, so that 1 - p of a confident target is a sum of small positive numbers and never a cancellation.
// Backward: logits are overwritten with their gradient, from the forward's statistics.
//
// Rows are independent: the bits cannot depend on the thread count. A NaN stays in its row.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/vmath.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kBlock = 1024;           // 4 KiB of float32
constexpr int64_t kWorkPerTask = 1 << 15;  // logits; smaller tasks would cost more to hand out than to do
constexpr int64_t kWorkPerThread = 1 << 17;

float largest_lane(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

float sum_lanes(Vec v) {
  float sum = v[0];
  for (int i = 1; i < kLanes; ++i) sum += v[i];
  return sum;
}

// The last, partial vector of a block, filled up with `filler`.
Vec load_tail(const float* p, int64_t n, float filler) {
  float lane[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = i < n ? p[i] : filler;
  return load(lane);
}

float block_max(const float* z, int64_t n) {
  Vec best[4];
  for (int k = 0; k < 4; ++k) best[k] = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) best[k] = max_or_second(load(z + i + k * kLanes), best[k]);
  for (; i + kLanes <= n; i += kLanes) best[0] = max_or_second(load(z + i), best[0]);
  if (i < n) best[1] = max_or_second(load_tail(z + i, n - i, -INFINITY), best[1]);
  return largest_lane(max_or_second(max_or_second(best[0], best[1]), max_or_second(best[2], best[3])));
}

// sum of exp(x) and of x exp(x) over a block, x = (z - top) * scale <= 0.
struct BlockSums {
  float weight, weighted;
};

template <bool kEntropy>
BlockSums block_sums(const float* z, int64_t n, float top, float scale) {
  constexpr int kWays = 4;  // independent chains hide the latency of the additions
  Vec weight[kWays] = {}, weighted[kWays] = {};
  const Vec shift = splat(top);
  auto add = [&](int k, Vec value) {
    const Vec x = (value - shift) * scale;
    const Vec e = vexp(x);
    weight[k] += e;
    // -infinity has weight 0 and must not become 0 * infinity
    if (kEntropy) weighted[k] += e * max_or_second(splat(-1000.0f), x);
  };
  int64_t i = 0;
  for (; i + kWays * kLanes <= n; i += kWays * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kWays; ++k) add(k, load(z + i + k * kLanes));
  for (; i + kLanes <= n; i += kLanes) add(0, load(z + i));
  if (i < n) add(1, load_tail(z + i, n - i, -INFINITY));
  return {sum_lanes((weight[0] + weight[1]) + (weight[2] + weight[3])),
          kEntropy ? sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) : 0.0f};
}

// z := cap * tanh(z / cap), and slope := its derivative where asked for.
void cap_block(float* z, int64_t n, float cap, float* slope) {
  const float inverse = 1.0f / cap;
  for (int64_t i = 0; i < n; i += kLanes) {  // buffers are a multiple of kLanes long
    const TanhParts t = vtanh(load(z + i) * inverse);
    store(z + i, t.value * cap);
    if (slope) store(slope + i, t.slope);
  }
}

// A block as float32, soft-capped. Both buffers hold kBlock floats.
template <class T>
void stage(const T* in, int64_t n, float cap, float* out, float* slope) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
  if (cap == 0) return;
  for (int64_t i = n; i % kLanes; ++i) out[i] = 0.0f;
  cap_block(out, n, cap, slope);
}

// ---- forward ----

struct Row {
  double rest = 0.0, weighted = 0.0;  // sums relative to top, over the row without its target
  float top;
};

void raise_top(Row& row, float top, double scale) {
  if (row.rest != 0.0) {  // also true for NaN
    const double fall = (double(row.top) - double(top)) * scale, factor = exp(fall);
    row.weighted = (row.weighted + fall * row.rest) * factor;
    row.rest *= factor;
  }
  row.top = top;
}

template <class T, bool kEntropy>
void forward_row(const LogprobRowsArgs& args, int64_t r) {
  alignas(64) float staged[kBlock];
  const int64_t n = args.logits.cols, target = args.target[r];
  const T* z = row_of<T>(args.logits, r);
  const double scale = 1.0 / args.temperature;
  float z_target = -INFINITY;
  if (target >= 0) {
    float lane[kLanes] = {to_float(z[target])};
    if (args.softcap != 0) cap_block(lane, kLanes, args.softcap, nullptr);
    z_target = lane[0];
  }
  Row row;
  row.top = z_target;  // NaN here makes the whole row NaN
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = min64(kBlock, n - begin);
    const bool holds_target = target >= begin && target < begin + size;
    const float* block = staged;
    bool in_place = false;
    if constexpr (std::is_same_v<T, float>) {
      in_place = args.softcap == 0 && !holds_target;
      if (in_place) block = z + begin;
    }
    if (!in_place) {
      stage(z + begin, size, args.softcap, staged, nullptr);
      if (holds_target) staged[target - begin] = -INFINITY;
    }
    const float top = block_max(block, size);
    if (top > row.top) raise_top(row, top, scale);
    if (row.top == -INFINITY) {  // no finite logit yet; a NaN must still be seen
      for (int64_t i = 0; i < size; ++i)
        if (block[i] != block[i]) row.top = block[i];
      continue;
    }
    const BlockSums sums = block_sums<kEntropy>(block, size, row.top, float(scale));
    row.rest += sums.weight;
    row.weighted += sums.weighted;
  }
  // A row without one finite logit has no distribution: NaN, as log_softmax says.
  const double top = row.top == -INFINITY ? double(NAN) : double(row.top);
  const double x = target >= 0 ? (double(z_target) - top) * scale : -double(INFINITY);
  const double own = exp(x);
  const double log_sum = own == 1.0 ? log1p(row.rest) : log(own + row.rest);
  args.top[r] = float(top);
  args.log_sum[r] = float(log_sum);
  args.logprob[r] = target >= 0 ? float(x - log_sum) : 0.0f;
  if (kEntropy) args.entropy[r] = float(log_sum - (row.weighted + (own > 0 ? own * x : own)) / (own + row.rest));
}

// ---- backward ----

// out = factor * exp((z - top) * scale) * slope (slope null: 1); out may be z.
void gradient_block(const float* z, int64_t n, float top, float scale, float factor, const float* slope, float* out) {
  const Vec shift = splat(top);
  auto gradient = [&](Vec value) { return vexp((value - shift) * scale) * factor; };
  int64_t i = 0;
  if (!slope) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Vec a = gradient(load(z + i)), b = gradient(load(z + i + kLanes));
      store(out + i, a);
      store(out + i + kLanes, b);
    }
  }
  for (; i + kLanes <= n; i += kLanes) store(out + i, gradient(load(z + i)) * (slope ? load(slope + i) : splat(1.0f)));
  if (i < n) {
    float lane[kLanes];
    store(lane, gradient(load_tail(z + i, n - i, 0.0f)));
    for (int64_t k = 0; i + k < n; ++k) out[i + k] = lane[k] * (slope ? slope[i + k] : 1.0f);
  }
}

template <class T>
void backward_row(const LogprobBackwardArgs& args, int64_t r) {
  alignas(64) float staged[kBlock], slopes[kBlock];
  const int64_t n = args.logits.cols, target = args.target[r];
  T* z = own_row_of<T>(args.logits, r);
  const double g = args.grad[r];
  if (g == 0.0 || target < 0) {  // also where the logits are NaN: the row does not count
    std::memset(static_cast<void*>(z), 0, size_t(n) * sizeof(T));
    return;
  }
  const double scale = 1.0 / args.temperature;
  const float top = args.top[r], factor = float(-g * scale * exp(-double(args.log_sum[r])));
  const float own = float(g * scale * -expm1(double(args.logprob[r])));  // 1 - p without a cancellation
  const bool capped = args.softcap != 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = min64(kBlock, n - begin);
    const bool holds_target = target >= begin && target < begin + size;
    if constexpr (std::is_same_v<T, float>) {
      if (!capped) {
        gradient_block(z + begin, size, top, float(scale), factor, nullptr, z + begin);
        if (holds_target) z[target] = own;
        continue;
      }
    }
    stage(z + begin, size, args.softcap, staged, slopes);
    gradient_block(staged, size, top, float(scale), factor, capped ? slopes : nullptr, staged);
    if (holds_target) staged[target - begin] = own * (capped ? slopes[target - begin] : 1.0f);
    for (int64_t i = 0; i < size; ++i) from_float(staged[i], z + begin + i);
  }
}

template <class F>
void for_each_row(const MatrixView& logits, int n_threads, F&& f) {
  const int64_t per_task = max64(1, kWorkPerTask / max64(1, logits.cols));
  const int64_t worth = logits.rows * logits.cols / kWorkPerThread + 1;  // starting a thread takes tens of microseconds
  run_rows(logits.rows, per_task, int(min64(n_threads, worth)), f);
}

}  // namespace

void logprob_rows(const LogprobRowsArgs& args) {
  with_dtype(args.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_row(args.logits, args.n_threads,
                 [&](int64_t r) { args.entropy ? forward_row<T, true>(args, r) : forward_row<T, false>(args, r); });
  });
}

void logprob_rows_backward(const LogprobBackwardArgs& args) {
  with_dtype(args.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_row(args.logits, args.n_threads, [&](int64_t r) { backward_row<T>(args, r); });
  });
}

}  // namespace cropi::CROPI_ISA
