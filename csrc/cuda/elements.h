// Runs of input elements as they are loaded: signs flipped, dropped and permuted while still packed, then added.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__CUDACC__)
#  include <cuda_fp16.h>
#endif

#include "cropi/dtype.h"
#include "cuda/threads.h"

namespace cropi::gpu {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

CROPI_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}
CROPI_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

CROPI_HD float widen(float x) { return x; }
CROPI_HD float widen(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
CROPI_HD float widen(F16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return float_of(bits_of(float(mantissa) * 5.9604644775390625e-8f) | sign);  // 2^-24, exact
#endif
}

CROPI_HD float load_one(const float* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}
template <class T>
CROPI_HD T load_one(const T* p) {  // 16 bits wide
#if defined(__CUDA_ARCH__)
  return T{__ldg(reinterpret_cast<const unsigned short*>(p))};
#else
  return *p;
#endif
}

CROPI_HD uint32_t raw(float x) { return bits_of(x); }
CROPI_HD uint32_t raw(Bf16 x) { return x.bits; }
CROPI_HD uint32_t raw(F16 x) { return x.bits; }

// kCount elements of a row: 16 bytes at an address that is a multiple of 16, or a single one.
template <class T, int kCount>
struct Run {
  static constexpr int kPerWord = kCount == 1 ? 1 : 4 / int(sizeof(T));
  static constexpr int kWords = kCount / kPerWord;
  uint32_t word[kWords];

  CROPI_HD void clear() {
    CROPI_UNROLL
    for (int w = 0; w < kWords; ++w) word[w] = 0;
  }

  CROPI_HD void load(const T* p) {
    if constexpr (kCount == 1) {
      word[0] = raw(load_one(p));
    } else {
      static_assert(sizeof(T) * kCount == 16, "a run is one 16-byte load");
#if defined(__CUDA_ARCH__)
      const uint4 q = __ldg(reinterpret_cast<const uint4*>(p));
      word[0] = q.x, word[1] = q.y, word[2] = q.z, word[3] = q.w;
#else
      std::memcpy(word, p, 16);
#endif
    }
  }

  CROPI_HD void store(T* p) const {
    static_assert(sizeof(T) * kCount == 16, "a run is one 16-byte store");
#if defined(__CUDA_ARCH__)
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(word[0], word[1], word[2], word[3]));  // not read again soon
#else
    std::memcpy(p, word, 16);
#endif
  }

  // Elements at - at + kCount, zero outside [begin, end).
  CROPI_HD void load_inside(const T* x, int32_t at, int32_t begin, int32_t end) {
    CROPI_UNROLL
    for (int w = 0; w < kWords; ++w) {
      word[w] = 0;
      CROPI_UNROLL
      for (int h = 0; h < kPerWord; ++h) {
        const int32_t i = at + w * kPerWord + h;
        if (i >= begin && i < end) word[w] |= raw(load_one(x + i)) << (16 * h);
      }
    }
  }

  // Bit e of `bits` stands for element e.
  CROPI_HD void flip(uint32_t bits) {
    if constexpr (kPerWord == 2) {
      const uint32_t spread = bits | bits << 15;  // bits 2w and 2w + 1 at 2w and 2w + 16
      CROPI_UNROLL
      for (int w = 0; w < kWords; ++w) word[w] ^= spread << (15 - 2 * w) & 0x80008000u;
    } else {
      constexpr int kTop = 8 * int(sizeof(T)) - 1;
      CROPI_UNROLL
      for (int w = 0; w < kWords; ++w) word[w] ^= (bits >> w & 1u) << kTop;
    }
  }

  CROPI_HD void keep(uint32_t bits) {
    CROPI_UNROLL
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPerWord == 2)
        word[w] &= (bits >> (2 * w) & 1u) * 0xffffu | (bits >> (2 * w + 1) & 1u) * 0xffff0000u;
      else
        word[w] &= 0u - (bits >> w & 1u);
    }
  }

  // Element e comes from element e ^ low.
  CROPI_HD void permute(uint32_t low) {
    if constexpr (kWords == 4) {
      const uint32_t word_bits = low / kPerWord;
      if (word_bits & 1) swap(word[0], word[1]), swap(word[2], word[3]);
      if (word_bits & 2) swap(word[0], word[2]), swap(word[1], word[3]);
      if (kPerWord == 2 && low & 1) CROPI_UNROLL
      for (int w = 0; w < 4; ++w) word[w] = word[w] >> 16 | word[w] << 16;
    }
  }

  CROPI_HD void add_to(float* sum) const {
    CROPI_UNROLL
    for (int e = 0; e < kCount; ++e) sum[e] += element(e);
  }

 private:
  CROPI_HD float element(int e) const {
    if constexpr (sizeof(T) == 4)
      return float_of(word[e]);
    else
      return widen(T{uint16_t(word[e / kPerWord] >> (16 * (e % kPerWord)))});
  }
  CROPI_HD static void swap(uint32_t& a, uint32_t& b) {
    const uint32_t c = a;
    a = b, b = c;
  }
};

}  // namespace cropi::gpu
