// Philox4x32-10 for a vector of counters at a time: word for word what cropi/philox.h draws one by one.
#pragma once
#if defined(__SSE__)
#  include <immintrin.h>
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

// kN independent vectors side by side: one alone waits for its multiplications most of the time.
template <int kN>
static inline void philox_rounds(Key key, VecU32 (&c)[kN][4]) {
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      VecU32 high0, low0, high2, low2;
      multiply_wide(c[n][0], 0xD2511F53u, &high0, &low0);
      multiply_wide(c[n][2], 0xCD9E8D57u, &high2, &low2);
      c[n][0] = high2 ^ c[n][1] ^ k0;
      c[n][2] = high0 ^ c[n][3] ^ k1;
      c[n][1] = low2;
      c[n][3] = low0;
    }
  }
}

static inline VecDraw philox_vec(Key key, VecU32 c0, VecU32 c1, VecU32 c2, VecU32 c3) {
  VecU32 c[1][4] = {{c0, c1, c2, c3}};
  philox_rounds<1>(key, c);
  return VecDraw{{c[0][0], c[0][1], c[0][2], c[0][3]}};
}

// Counter words (low, high) of `first` + 0, 1, 2, ...
struct VecCounter {
  VecU32 low, high;
};

static inline VecCounter count_from(uint64_t first) {
  VecU32 low{};
  for (int i = 0; i < kLanes; ++i) low[i] = uint32_t(i);
  low += uint32_t(first);
  const VecU32 wrapped = VecU32(low < VecU32{} + uint32_t(first));  // all bits set: -1
  return {low, uint32_t(first >> 32) - wrapped};
}

// In each 128-bit lane, the 4 x 4 words of a transposed: from four words of four draws to draw after draw.
static inline void transpose_lanes(VecU32 (&a)[4]) {
#if defined(CROPI_ISA_v4)
  const auto mix = [](VecU32 x, VecU32 y, VecU32* low, VecU32* high) {
    *low = VecU32(_mm512_maskz_unpacklo_epi32(0xffff, __m512i(x), __m512i(y)));
    *high = VecU32(_mm512_maskz_unpackhi_epi32(0xffff, __m512i(x), __m512i(y)));
  };
#elif defined(CROPI_ISA_v3)
  const auto mix = [](VecU32 x, VecU32 y, VecU32* low, VecU32* high) {
    *low = VecU32(_mm256_unpacklo_epi32(__m256i(x), __m256i(y)));
    *high = VecU32(_mm256_unpackhi_epi32(__m256i(x), __m256i(y)));
  };
#else
  const auto mix = [](VecU32 x, VecU32 y, VecU32* low, VecU32* high) {
    *low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    *high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
  };
#endif
  VecU32 b[4];
  mix(a[0], a[2], &b[0], &b[1]);
  mix(a[1], a[3], &b[2], &b[3]);
  mix(b[0], b[2], &a[0], &a[1]);
  mix(b[1], b[3], &a[2], &a[3]);
}

// Draws of n counters: counters(i) gives those of the draws i to i + kLanes - 1 of a list, and word m of the draw in
// lane l of them comes out as words[4 * (i + place_of_lane(l)) + m], so that transposed vectors are stored whole.
// `words` has room for n rounded up to kDrawsAtOnce.
constexpr int kDrawsAtOnce = 2 * kLanes;

constexpr int place_of_lane(int l) { return l % 4 * (kLanes / 4) + l / 4; }

template <class Counters>
static inline void draw_listed(Key key, int64_t n, Counters&& counters, uint32_t purpose, uint32_t third,
                               uint32_t* words) {
  for (int64_t i = 0; i < n; i += kDrawsAtOnce) {
    VecU32 c[2][4];
    for (int k = 0; k < 2; ++k) {
      const VecCounter counter = counters(i + k * kLanes);
      c[k][0] = counter.low;
      c[k][1] = counter.high;
      c[k][2] = VecU32{} + purpose;
      c[k][3] = VecU32{} + third;
    }
    philox_rounds<2>(key, c);
    for (int k = 0; k < 2; ++k) {
      transpose_lanes(c[k]);
      for (int m = 0; m < 4; ++m) *reinterpret_cast<VecU32U*>(words + 4 * (i + k * kLanes) + m * kLanes) = c[k][m];
    }
  }
}

// first + index, for every lane.
static inline VecCounter count_on(uint64_t first, VecU32 index) {
  const VecU32 low = index + uint32_t(first);
  return VecCounter{low, VecU32{} + uint32_t(first >> 32) - VecU32(low < index)};  // true is -1: the carry
}

// words[4 * i + m] = word m of draw (first + i, purpose, third), i < n.
static inline void draw_words(Key key, uint64_t first, int64_t n, uint32_t purpose, uint32_t third, uint32_t* words) {
  VecU32 place;
  for (int l = 0; l < kLanes; ++l) place[l] = uint32_t(place_of_lane(l));
  draw_listed(key, n, [&](int64_t i) { return count_on(first + uint64_t(i), place); }, purpose, third, words);
}

}  // namespace cropi::CROPI_ISA
