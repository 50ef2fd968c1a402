// The textbook CountSketch of a gradient that exists: a bucket and a sign drawn for every coordinate, and CROPI's
// dropout (keep a uniform random share of all coordinates). The yardstick of fidelity, not the fast path.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kParts = 8;    // fixed, so that the order of the sums does not follow the thread count
constexpr int64_t kBlock = 256;  // coordinates hashed at a time: 64 draws of 4 words

// Words of Philox draws for coordinates 4 * first .. 4 * first + kBlock, laid out coordinate by coordinate.
void draw_block(Key key, uint64_t first, uint32_t domain, uint32_t* words) {
  constexpr int kDraws = kBlock / 4;
  uint32_t c0[kDraws], c1[kDraws], c2[kDraws], c3[kDraws];
  for (int i = 0; i < kDraws; ++i) {
    const uint64_t index = first + uint64_t(i);
    c0[i] = uint32_t(index);
    c1[i] = uint32_t(index >> 32);
    c2[i] = domain;
    c3[i] = 0;
  }
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kDraws; ++i) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0[i], p1 = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = uint32_t(p1);
      c3[i] = uint32_t(p0);
    }
  }
  for (int i = 0; i < kDraws; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

void add_range(const FlatSketchArgs& args, int64_t begin, int64_t end, float* out) {
  uint32_t place[kBlock], keep[kBlock];
  const uint32_t mask = uint32_t(args.dim - 1);
  for (int64_t i = begin; i < end;) {
    const uint64_t p = args.offset + uint64_t(i);
    const uint64_t first = p / 4;
    const int64_t skip = int64_t(p % 4);  // a shard may start inside a draw
    const int64_t n = end - i < kBlock - skip ? end - i : kBlock - skip;
    draw_block(args.key, first, 0, place);
    if (args.keep_below) draw_block(args.key, first, 1, keep);
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t word = place[skip + j];
      if (args.keep_below && keep[skip + j] >= args.keep_below) continue;
      out[word & mask] += (word >> 31) ? -args.x[i + j] : args.x[i + j];
    }
    i += n;
  }
}

}  // namespace

void flat_sketch(const FlatSketchArgs& args) {
  const int64_t per_part = (args.n + kParts - 1) / kParts;
  Scratch parts(kParts * args.dim);
  std::memset(parts.data(), 0, size_t(kParts * args.dim) * 4);
  run_tasks(kParts, args.n_threads, [&](int64_t part) {
    const int64_t begin = part * per_part, end = begin + per_part < args.n ? begin + per_part : args.n;
    if (begin < end) add_range(args, begin, end, parts.data() + part * args.dim);
  });
  for (int64_t part = 0; part < kParts; ++part)
    for (int64_t i = 0; i < args.dim; ++i) args.out[i] += args.scale * parts.data()[part * args.dim + i];
}

}  // namespace cropi::CROPI_ISA
