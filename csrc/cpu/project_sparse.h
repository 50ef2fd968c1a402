// How the sparse kernels of `project` cut coordinates into blocks, tiles and runs, and what is drawn for them.
#pragma once
#include "cpu/project.h"

namespace cropi::CROPI_ISA {
namespace {

struct Shape {
  int64_t width, group, block;  // buckets of a nonzero; gcd(width, 16); coordinates whose draws are made at once
};

inline Shape shape_of(const ProjectArgs& args) {
  Shape s;
  s.width = args.dim / args.nnz;
  s.group = min64(s.width & -s.width, kGroup);
  // Long enough to repay fetching a row's buckets; with several nonzeros short, to be read again from L2.
  const int64_t most = args.nnz == 1 ? min64(max64(32 * s.width / 128 * 128, 1 << 17), 1 << 20) : 1 << 16;
  s.block = max64(min64(most, s.width * 4096), 4096);  // few enough tiles
  return s;
}

// Blocks are counted from coordinate 0, so that a shard's blocks are those of the whole.
struct Blocks {
  uint64_t first, block, begin, end;
  int64_t count;
  Blocks(const ProjectArgs& args, const Shape& s)
      : first(args.offset / uint64_t(s.block)),
        block(uint64_t(s.block)),
        begin(args.offset),
        end(args.offset + uint64_t(args.x.cols)),
        count(int64_t((end - 1) / block - first) + 1) {}
  uint64_t start(int64_t i) const { return i == 0 ? begin : (first + uint64_t(i)) * block; }
  uint64_t stop(int64_t i) const {
    const uint64_t next = (first + uint64_t(i) + 1) * block;
    return next < end ? next : end;
  }
};

// Draws for the coordinates [first, first + block), `first` a multiple of 128.
struct Draws {
  Scratch signs, keep, tiles;
  int64_t sign_words, max_tiles;
  uint64_t first = 0, first_tile = 0;

  Draws(const ProjectArgs& args, const Shape& s)
      : signs(args.nnz * (s.block / 32 + 4 + 4 * kDrawsAtOnce)),
        keep(args.keep < kKeepAll ? s.block / 32 + 4 : 1),
        tiles(args.nnz * 4 * (s.block / s.width + 2 + kDrawsAtOnce)),
        sign_words(s.block / 32 + 4 + 4 * kDrawsAtOnce),
        max_tiles(s.block / s.width + 2 + kDrawsAtOnce) {}

  uint32_t* sign_bits(int64_t j) const { return reinterpret_cast<uint32_t*>(signs.data()) + j * sign_words; }
  uint32_t* keep_bits() const { return reinterpret_cast<uint32_t*>(keep.data()); }
  uint32_t* tile_words(int64_t j) const { return reinterpret_cast<uint32_t*>(tiles.data()) + j * 4 * max_tiles; }

  TilePlace place(const Shape& s, int64_t j, uint64_t tile) const {
    const uint32_t* word = tile_words(j) + 4 * (tile - first_tile);
    return tile_place(word[0], word[1], uint32_t(s.width), uint32_t(s.group));
  }

  void make(const ProjectArgs& args, const Shape& s, uint64_t begin, uint64_t end) {
    first = begin / 128 * 128;
    first_tile = begin / uint64_t(s.width);
    const int64_t n = int64_t(end - first), n_tiles = int64_t((end - 1) / uint64_t(s.width) - first_tile) + 1;
    for (int64_t j = 0; j < args.nnz; ++j) {
      draw_words(args.key, first / 128, (n + 127) / 128, kProjectSign, uint32_t(j), sign_bits(j));
      draw_words(args.key, first_tile, n_tiles, kProjectTile, uint32_t(j), tile_words(j));
    }
    if (args.keep < kKeepAll) draw_keep(args.key, args.keep, first, n, keep_bits());
  }
};

// Calls f(p, length, bucket, low): coordinates p + i go to buckets (bucket + i) ^ low, i < length, of nonzero j.
// In the order of the coordinates: reading memory in any other order costs more than buckets that stay in L1 save.
template <class F>
void for_runs(const Draws& draws, const Shape& s, int64_t j, uint64_t begin, uint64_t end, F&& f) {
  const uint64_t width = uint64_t(s.width);
  uint64_t tile = begin / width;
  for (uint64_t p = begin; p < end; ++tile) {
    const TilePlace place = draws.place(s, j, tile);
    const uint64_t shift = place.shift;
    const uint64_t start = tile * width, stop = start + width < end ? start + width : end;
    const uint64_t wrap = start + width - shift;  // the first coordinate whose bucket starts again at 0
    if (p < wrap) {
      const uint64_t last = stop < wrap ? stop : wrap;
      f(p, int64_t(last - p), int64_t(p - start + shift), place.low);
      p = last;
    }
    if (p < stop) f(p, int64_t(stop - p), int64_t(p - wrap), place.low);
    p = stop;
  }
}

// Bits of coordinates, the first of them bit `shift` of a byte: those of a vector and some more. AVX2 loads them by a
// broadcast, one for every vector; where four lanes are a vector, one load serves a group.
constexpr bool kBitsOfVectors = kLanes >= 8;

inline uint32_t some_bits(const uint8_t* at, uint64_t shift) {
  uint32_t bits;
  std::memcpy(&bits, at, 4);  // little endian, as every machine served
  return bits >> shift;
}

// Those of the lanes from `lane` on of the group that begins at bit i, a multiple of 16 where groups are whole.
template <bool kWhole>
inline uint32_t vector_bits(const uint32_t* bits, uint64_t i, int64_t lane) {
  const uint64_t first = kBitsOfVectors ? i + uint64_t(lane) : i, rest = kBitsOfVectors ? 0 : uint64_t(lane);
  return some_bits(reinterpret_cast<const uint8_t*>(bits) + first / 8, (kWhole ? 0 : first % 8) + rest);
}

// v[lane ^ low]. The shuffle of the baseline is chosen among four that are known when compiling.
struct Swap {
  int64_t high;  // which vector of the group
#if defined(CROPI_ISA_v4)
  __m512i index;
  explicit Swap(uint32_t low) : high(0) {
    VecI32 i;
    for (int lane = 0; lane < kLanes; ++lane) i[lane] = lane ^ int32_t(low);
    index = __m512i(i);
  }
  Vec operator()(Vec v) const { return Vec(_mm512_maskz_permutexvar_ps(0xffff, index, __m512(v))); }
#elif defined(CROPI_ISA_v3)
  __m256i index;
  explicit Swap(uint32_t low) : high(low & 8) {
    VecI32 i;
    for (int lane = 0; lane < kLanes; ++lane) i[lane] = lane ^ int32_t(low & 7);
    index = __m256i(i);
  }
  Vec operator()(Vec v) const { return Vec(_mm256_permutevar8x32_ps(__m256(v), index)); }
#else
  uint32_t low;
  explicit Swap(uint32_t low) : high(low & 12), low(low & 3) {}
  Vec operator()(Vec v) const {
    switch (low) {
      case 0: return v;
      case 1: return __builtin_shufflevector(v, v, 1, 0, 3, 2);
      case 2: return __builtin_shufflevector(v, v, 2, 3, 0, 1);
      default: return __builtin_shufflevector(v, v, 3, 2, 1, 0);
    }
  }
#endif
};

// Numbers of x as float32, those without a bit in `keep` 0, the sign of those with one in `signs` flipped, in the order of
// their buckets.
template <class T>
struct Reader {
  Swap swap;
  explicit Reader(uint32_t low) : swap(low) {}
  int64_t high() const { return swap.high; }
  template <bool kKeep>
  Vec read(const T* x, uint32_t signs, uint32_t keep) const {
    Vec v = load_as_float(x);
    if (kKeep) v = keep_lanes(v, keep);
    return swap(flip_signs(v, signs));
  }
};

#if defined(CROPI_ISA_v3)
// One shuffle of bytes widens bfloat16 and changes places: 0.83 of the time of one after the other (SJLT, tiles of 4096).
template <>
struct Reader<BFloat16> {
  int64_t group;
  __m256i bytes, lane;
  explicit Reader(uint32_t low) : group(low & 8) {
    VecI32 b, c;
    for (int i = 0; i < kLanes; ++i) {
      b[i] = int32_t(0x01008080u + 0x02020000u * (uint32_t(i) ^ (low & 7)));
      c[i] = int32_t(31 - (uint32_t(i) ^ (low & 7)));
    }
    bytes = __m256i(b);
    lane = __m256i(c);
  }
  int64_t high() const { return group; }
  template <bool kKeep>
  Vec read(const BFloat16* x, uint32_t signs, uint32_t keep) const {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    VecI32 w = VecI32(_mm256_shuffle_epi8(v, bytes));
    const auto spread = [&](uint32_t bits) { return VecI32((VecU32{} + bits) << VecU32(lane)); };
    if (kKeep) w &= spread(keep) >> 31;
    return Vec(w ^ (spread(signs) & INT32_MIN));
  }
};
#endif

}  // namespace
}  // namespace cropi::CROPI_ISA
