// The register tile of the products with the head: kRows x kCols float32 sums, over operands of type A.
// A tile takes its left operand by broadcasts, from rows that need no packing, and its right one packed so that
// kPack consecutive depths of a column lie together: b[depth / kPack][kCols][kPack].
#pragma once
#if defined(CROPI_ISA_v4)
#  include <immintrin.h>
#endif

#include "cpu/simd.h"

namespace cropi::CROPI_ISA {

// 24 accumulators where there are 32 vector registers, 12 where there are 16.
#if defined(CROPI_ISA_v4) || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kVecs = 2, kCols = kVecs * kLanes;

// out[i][j] += sum_k a[i][k] b[k][j]; A = float: one multiply-add each.
struct FloatTile {
  using A = float;
  static constexpr int kPack = 1;

  static void narrow(const float* in, int64_t n, A* out) { std::memcpy(out, in, size_t(n) * sizeof(A)); }

  static void multiply_add(int64_t depth, const A* a, int64_t a_stride, const A* b, float* out, int64_t out_stride) {
    Vec acc[kRows][kVecs];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
    for (int64_t k = 0; k < depth; ++k) {
      Vec column[kVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) column[j] = load(b + k * kCols + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const Vec x = a[i * a_stride + k] - Vec{};
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] += x * column[j];
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        float* to = out + i * out_stride + j * kLanes;
        store(to, load(to) + acc[i][j]);
      }
  }
};

#if defined(CROPI_ISA_v4)
// Both operands bfloat16, sums float32: two multiply-adds per lane and instruction. Depth and strides are even.
struct BFloat16Tile {
  using A = BFloat16;
  static constexpr int kPack = 2;

  static bool supported() { return __builtin_cpu_supports("avx512bf16"); }

  __attribute__((target("avx512bf16"))) static void narrow(const float* in, int64_t n, A* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(in + i));
      std::memcpy(static_cast<void*>(out + i), &half, 32);
    }
    for (; i < n; ++i) from_float(in[i], out + i);
  }

  __attribute__((target("avx512bf16"))) static void multiply_add(int64_t depth, const A* a, int64_t a_stride,
                                                                 const A* b, float* out, int64_t out_stride) {
    __m512 acc[kRows][kVecs];
#  pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#  pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += kPack) {
      __m512bh column[kVecs];
#  pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j)
        column[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (k / kPack * kCols + j * kLanes) * kPack));
#  pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * a_stride + k, 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#  pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, column[j]);
      }
    }
#  pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#  pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        float* to = out + i * out_stride + j * kLanes;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]));
      }
  }
};
#endif

}  // namespace cropi::CROPI_ISA
