// What the kernels of `project` share: vector loads of any input type, sign flips by mask bits.
#pragma once
#include "cpu/kernels.h"
#include "cpu/philox_vec.h"
#include "cropi/project.h"

namespace cropi::CROPI_ISA {

constexpr int64_t kGroup = 16;  // coordinates that share one 16-bit piece of a mask

static inline uint32_t bit_of(const uint32_t* bits, uint64_t i) { return bits[i / 32] >> (i % 32) & 1; }

static inline Vec load_as_float(const float* p) { return load(p); }
// Spelled out: of the plain form gcc 12 makes two halves and joins them, five instructions for one.
static inline Vec load_as_float(const BFloat16* p) {
#if defined(CROPI_ISA_v4)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec(VecU32(_mm512_maskz_cvtepu16_epi32(0xffff, raw)) << 16);
#elif defined(CROPI_ISA_v3)
  return Vec(VecU32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) << 16);
#else
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  const Half raw = *reinterpret_cast<const Half*>(p);
  return Vec(__builtin_convertvector(raw, VecU32) << 16);
#endif
}
static inline Vec load_as_float(const Float16* p) {
#if defined(CROPI_ISA_v4)
  return Vec(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(CROPI_ISA_v3)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = float(p[i]);
  return v;
#endif
}

#if !defined(CROPI_ISA_v4)
// The sign bit of lane i: bit i of `bits`. AVX2 shifts every lane by a number of its own, which the baseline cannot.
static inline VecI32 lane_signs(uint32_t bits) {
  VecI32 lane;
#  if defined(CROPI_ISA_v3)
  for (int i = 0; i < kLanes; ++i) lane[i] = 31 - i;
  return VecI32((VecU32{} + bits) << VecU32(lane)) & INT32_MIN;
#  else
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  return (((VecI32{} + int32_t(bits)) & lane) != 0) & INT32_MIN;
#  endif
}
#endif

// -v in the lanes whose bit is set: a flip of the sign bit, exact for every value.
static inline Vec flip_signs(Vec v, uint32_t bits) {
#if defined(CROPI_ISA_v4)
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return Vec(_mm512_mask_xor_epi32(__m512i(v), __mmask16(bits), __m512i(v), sign));
#else
  return Vec(VecI32(v) ^ lane_signs(bits));
#endif
}

// v where the lane's bit is set, else 0, even for NaN.
static inline Vec keep_lanes(Vec v, uint32_t bits) {
#if defined(CROPI_ISA_v4)
  return Vec(_mm512_maskz_mov_ps(__mmask16(bits), __m512(v)));
#else
  return Vec(VecI32(v) & lane_signs(bits) >> 31);
#endif
}

// Bit p - first of the result: is coordinate p kept? `first` is a multiple of 128, `n` is rounded up to 128.
// From the first binary digit of `keep` to the last, the other way round than keep_step: a bit is open as long as its
// draws have said "ask the next digit". After some digits most draws have no open bit left and need not be made.
static inline void draw_keep(Key key, uint32_t keep, uint64_t first, int64_t n, uint32_t* mask) {
  constexpr int kDraws = 512, kWholeLevels = 7;
  constexpr int64_t kWords = 4 * kDraws;
  uint32_t fair[kWords], open[kWords], list[kDraws] = {};
  const int last = __builtin_ctz(keep);  // where all digits to come are 0, an open bit is not kept
  for (; n > 0; n -= 128 * kDraws, first += 128 * kDraws, mask += kWords) {
    const int64_t draws = min64((n + 127) / 128, kDraws);
    for (int64_t i = 0; i < 4 * draws; ++i) mask[i] = 0, open[i] = ~0u;
    int level = kKeepLevels - 1;
    for (; level >= last && level >= kKeepLevels - kWholeLevels; --level) {
      draw_words(key, first / 128, draws, kProjectKeep, uint32_t(level), fair);
      const uint32_t digit = -(keep >> level & 1);
      for (int64_t i = 0; i < 4 * draws; ++i) {
        mask[i] |= open[i] & fair[i] & digit;
        open[i] &= fair[i] ^ digit;
      }
    }
    int64_t listed = 0;
    const auto list_if_open = [&](uint32_t draw) {
      const uint32_t* o = open + 4 * draw;
      list[listed] = draw;
      listed += (o[0] | o[1] | o[2] | o[3]) != 0;
    };
    for (int64_t i = 0; i < draws && level >= last; ++i) list_if_open(uint32_t(i));
    for (; level >= last && listed > 0; --level) {
      const auto counters = [&](int64_t i) {
        return count_on(first / 128, *reinterpret_cast<const VecU32U*>(list + i));
      };
      draw_listed(key, listed, counters, kProjectKeep, uint32_t(level), fair);
      const uint32_t digit = -(keep >> level & 1);
      const int64_t before = listed;
      listed = 0;
      for (int64_t i = 0; i < before; ++i) {
        const uint32_t draw = list[i], *f = fair + 4 * (i / kLanes * kLanes + place_of_lane(int(i % kLanes)));
        for (int m = 0; m < 4; ++m) {
          mask[4 * draw + m] |= open[4 * draw + m] & f[m] & digit;
          open[4 * draw + m] &= f[m] ^ digit;
        }
        list_if_open(draw);
      }
    }
  }
}

// part[0] += part[1] + part[2] + ... in a fixed tree; parts are `stride` apart, columns [begin, end).
static inline void add_tree(float* part, int64_t parts, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t step = 1; step < parts; step *= 2)
    for (int64_t q = 0; q + step < parts; q += 2 * step) {
      float* to = part + q * stride;
      const float* from = to + step * stride;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
}

}  // namespace cropi::CROPI_ISA
