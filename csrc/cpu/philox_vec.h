// Philox4x32-10 for a vector of counters at a time: word for word what cropi/philox.h draws one by one.
#pragma once
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "cpu/simd.h"
#include "cropi/philox.h"

namespace cropi::CROPI_ISA {

typedef uint32_t VecU32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU32U __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));

// Products of the low halves of 64-bit lanes. Spelled out: compilers turn the plain form into 64-bit multiplies
// (and masked: gcc 12 calls the unmasked form uninitialised).
static inline VecU64 multiply_low(VecU64 a, VecU64 b) {
#if defined(CROPI_ISA_v4)
  return VecU64(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif defined(CROPI_ISA_v3)
  return VecU64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return VecU64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

static inline void multiply_wide(VecU32 a, uint32_t b, VecU32* high, VecU32* low) {
  const VecU64 kLow = VecU64{} + 0xffffffffu, factor = VecU64{} + b;
  const VecU64 even = multiply_low(VecU64(a), factor), odd = multiply_low(VecU64(a) >> 32, factor);
  *high = VecU32((even >> 32) | (odd & ~kLow));
  *low = VecU32((even & kLow) | (odd << 32));
}

struct VecDraw {
  VecU32 w[4];
};

static inline VecDraw philox_vec(Key key, VecU32 c0, VecU32 c1, VecU32 c2, VecU32 c3) {
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    VecU32 high0, low0, high2, low2;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high2, &low2);
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
  }
  return VecDraw{{c0, c1, c2, c3}};
}

// Counter words (low, high) of `first` + 0, 1, 2, ...
struct VecCounter {
  VecU32 low, high;
};

static inline VecCounter count_from(uint64_t first) {
  VecCounter c;
  for (int i = 0; i < kLanes; ++i) {
    c.low[i] = uint32_t(first + uint64_t(i));
    c.high[i] = uint32_t((first + uint64_t(i)) >> 32);
  }
  return c;
}

// words[4 * i + m] = word m of draw (first + i, purpose, third), i < n; n is rounded up to whole vectors.
static inline void draw_words(Key key, uint64_t first, int64_t n, uint32_t purpose, uint32_t third, uint32_t* words) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecCounter c = count_from(first + uint64_t(i));
    const VecDraw d = philox_vec(key, c.low, c.high, VecU32{} + purpose, VecU32{} + third);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int m = 0; m < 4; ++m) words[4 * (i + lane) + m] = d.w[m][lane];
  }
}

}  // namespace cropi::CROPI_ISA
