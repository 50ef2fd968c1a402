// RMSNorm forward and backward. In the same pass over x and dy the backward also gives the scale's gradient per segment.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parts.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kTokensPerPart = 128;
constexpr int64_t kRowsPerTask = 16;

// sum_i term(i): float32 within 256 terms, where sixteen running sums add sixteen each, and float64 beyond.
template <class F>
double sum_of(int64_t n, F&& term) {
  double total = 0.0;
  for (int64_t block = 0; block < n; block += 256) {
    const int64_t end = min64(block + 256, n);
    float lanes[16] = {};
    int64_t i = block;
    for (; i + 16 <= end; i += 16)
      for (int k = 0; k < 16; ++k) lanes[k] += term(i + k);
    for (int k = 0; i < end; ++i, ++k) lanes[k] += term(i);
    for (int k = 0; k < 16; ++k) total += double(lanes[k]);
  }
  return total;
}

template <class T>
void forward_row(const RmsNormArgs& args, int64_t t) {
  const int64_t n = args.x.cols;
  const T* x = row_of<T>(args.x, t);
  const T* weight = static_cast<const T*>(args.weight);
  T* y = static_cast<T*>(args.y) + t * n;
  const double square = sum_of(n, [&](int64_t i) { return to_float(x[i]) * to_float(x[i]); });
  const float scale = float(1.0 / std::sqrt(square / double(n) + double(args.eps)));
  args.scale[t] = scale;
  for (int64_t i = 0; i < n; ++i) from_float(to_float(weight[i]) * (to_float(x[i]) * scale), y + i);
}

// dx of one row; adds dy * x * scale to `sums`, if there are any.
template <class T>
void backward_row(const RmsNormBackwardArgs& args, int64_t t, float* sums) {
  const int64_t n = args.x.cols;
  const T *x = row_of<T>(args.x, t), *dy = row_of<T>(args.dy, t);
  const T* weight = static_cast<const T*>(args.weight);
  T* dx = static_cast<T*>(args.dx) + t * n;
  const float scale = args.scale[t];
  const double dot =
      sum_of(n, [&](int64_t i) { return to_float(dy[i]) * to_float(weight[i]) * (to_float(x[i]) * scale); });
  const float mean = float(dot / double(n));
  for (int64_t i = 0; i < n; ++i) {
    const float normal = to_float(x[i]) * scale, d = to_float(dy[i]);
    if (sums) sums[i] += d * normal;
    from_float(scale * (d * to_float(weight[i]) - normal * mean), dx + i);
  }
}

template <class T>
void backward(const RmsNormBackwardArgs& args) {
  const int64_t n = args.x.cols;
  const Parts parts(args.offsets, args.n_segments, kTokensPerPart);
  Scratch sums(args.sums ? n * parts.count() : 0);
  run_tasks(parts.count(), args.n_threads, [&](int64_t p) {
    const TokenRange tokens = parts.tokens(p);
    float* own = args.sums ? sums.data() + p * n : nullptr;
    if (own) std::memset(own, 0, size_t(n) * 4);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) backward_row<T>(args, t, own);
  });
  if (!args.sums) return;
  for (int64_t s = 0; s < args.n_segments; ++s) {
    float* out = args.sums + s * n;
    for (int64_t i = 0; i < n; ++i) out[i] = 0.0f;
    for (int64_t p = parts.first(s); p < parts.first(s + 1); ++p)
      for (int64_t i = 0; i < n; ++i) out[i] += sums.data()[p * n + i];
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args) {
  with_dtype(args.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(args.x.rows, kRowsPerTask, args.n_threads, [&](int64_t t) { forward_row<T>(args, t); });
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args) {
  with_dtype(args.x.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace cropi::CROPI_ISA
