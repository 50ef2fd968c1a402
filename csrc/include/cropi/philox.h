// Philox4x32-10 (Salmon et al., SC 2011): the one source of randomness of every sketch.
// A counter-based generator needs no state and no table: word w of draw (c0, c1, c2, c3) under key (k0, k1) is a
// pure function, so C++, numpy, Triton and CUDA agree to the bit and any part of a sketch can be drawn alone.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#  define CROPI_HD __host__ __device__ __forceinline__
#else
#  define CROPI_HD inline __attribute__((always_inline))
#endif

namespace cropi {

struct Key {
  uint32_t k0, k1;
};

struct Draw {
  uint32_t w[4];
};

CROPI_HD Draw philox(Key key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Draw{{c0, c1, c2, c3}};
}

}  // namespace cropi
