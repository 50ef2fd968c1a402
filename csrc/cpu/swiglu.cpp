// silu(gate) * up and its gradients, silu(z) = z sigmoid(z).
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/vmath.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

// sigmoid(z) and sigmoid(-z), by the exponential of -|z|, which does not overflow; neither comes from a difference.
struct Sigmoids {
  Vec of, of_minus;
};

Sigmoids sigmoids(Vec z) {
  const Vec e = vexp(-max_or_second(z, -z)), large = 1.0f / (1.0f + e), small = e * large;
  const auto negative = z < splat(0.0f);
  return {negative ? small : large, negative ? large : small};
}

template <class T>
Vec load_some(const T* in, int64_t n) {
  float x[kLanes] = {};
  if (n >= kLanes)
    for (int k = 0; k < kLanes; ++k) x[k] = to_float(in[k]);
  else
    for (int64_t k = 0; k < n; ++k) x[k] = to_float(in[k]);
  return load(x);
}

template <class T>
void store_some(T* out, Vec v, int64_t n) {
  float x[kLanes];
  store(x, v);
  if (n >= kLanes)
    for (int k = 0; k < kLanes; ++k) from_float(x[k], out + k);
  else
    for (int64_t k = 0; k < n; ++k) from_float(x[k], out + k);
}

template <class T>
void forward_row(const SwigluArgs& args, int64_t t) {
  const int64_t n = args.gate.cols;
  const T *gate = row_of<T>(args.gate, t), *up = row_of<T>(args.up, t);
  T* out = static_cast<T*>(args.out) + t * n;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec z = load_some(gate + i, n - i);
    store_some(out + i, z * sigmoids(z).of * load_some(up + i, n - i), n - i);
  }
}

template <class T>
void backward_row(const SwigluBackwardArgs& args, int64_t t) {
  const int64_t n = args.gate.cols;
  const T *gate = row_of<T>(args.gate, t), *up = row_of<T>(args.up, t), *dh = row_of<T>(args.dh, t);
  T *dgate = static_cast<T*>(args.dgate) + t * n, *dup = static_cast<T*>(args.dup) + t * n;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec z = load_some(gate + i, n - i), d = load_some(dh + i, n - i);
    const Sigmoids s = sigmoids(z);
    store_some(dgate + i, d * load_some(up + i, n - i) * (s.of * (1.0f + z * s.of_minus)), n - i);
    store_some(dup + i, d * (z * s.of), n - i);
  }
}

}  // namespace

void swiglu(const SwigluArgs& args) {
  with_dtype(args.gate.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(args.gate.rows, kRowsPerTask, args.n_threads, [&](int64_t t) { forward_row<T>(args, t); });
  });
}

void swiglu_backward(const SwigluBackwardArgs& args) {
  with_dtype(args.gate.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(args.gate.rows, kRowsPerTask, args.n_threads, [&](int64_t t) { backward_row<T>(args, t); });
  });
}

}  // namespace cropi::CROPI_ISA
