// Exponential and tanh of a vector of floats, without libm and without -ffast-math: infinities and NaN must survive.
// Minimax polynomials (Lawson's iteration on Chebyshev points); tests/kernels/test_logprob_rows.py measures the exponential on
// 400,000 points against double.
#pragma once
#if defined(__SSE__)
#  include <immintrin.h>
#endif

#include "cpu/simd.h"

namespace cropi::CROPI_ISA {

static inline Vec splat(float x) { return x - Vec{}; }  // x - 0 keeps -0 and NaN

// a where a > b, else b: a NaN in b stays, a NaN in a is dropped.
static inline Vec max_or_second(Vec a, Vec b) {
#if defined(CROPI_ISA_v4)
  return _mm512_maskz_max_ps(0xffff, a, b);  // gcc 12 calls the unmasked form uninitialised
#elif defined(CROPI_ISA_v3)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// exp(x) for x < 88.3, relative error below 1.2e-7 (1 ulp) for x >= -87.3; 0 from about -87.7 down; NaN stays NaN.
static inline Vec vexp(Vec x) {
  const Vec kMagic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  x = max_or_second(splat(-88.0f), x);    // there the power of two below becomes +0
  const Vec shifted = x * 1.44269504f + kMagic;
  const Vec n = shifted - kMagic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // the first constant has 9 bits: an exact product
  Vec q = 1.38145988e-3f * r + 8.36871658e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 0.166665211f;
  q = q * r + 0.499999940f;
  q = (q * r) * r + r;
  const VecI32 exponent = (reinterpret_cast<VecI32>(shifted) - 0x4B400000 + 127) << 23;
  const Vec power = reinterpret_cast<Vec>(exponent);
  return q * power + power;
}

// tanh(u) and its derivative, both to a few ulp in relative terms however flat the curve.
struct TanhParts {
  Vec value, slope;
};

static inline TanhParts vtanh(Vec u) {
  const Vec magnitude = max_or_second(u, -u);
  const Vec e = vexp(-2.0f * magnitude), inverse = 1.0f / (1.0f + e);
  const Vec square = u * u;
  Vec p = -5.70498174e-3f * square + 2.06390824e-2f;  // near 0, where 1 - e would cancel
  p = p * square + -5.37397154e-2f;
  p = p * square + 0.133314416f;
  p = p * square + -0.333332807f;
  const Vec small = p * square * u + u;
  const Vec large = (1.0f - e) * inverse;
  const Vec value = magnitude < splat(0.625f) ? small : (u < splat(0.0f) ? -large : large);
  return {value, 4.0f * e * inverse * inverse};
}

}  // namespace cropi::CROPI_ISA
