// CountSketch and SJLT of rows that exist, at the speed of reading them (docs/project.md has the formula).
//
// Coordinates are cut into tiles as wide as the buckets of one nonzero. A tile is added to the buckets shifted by a
// hashed multiple of 16 and XORed with a hashed number below 16: runs of coordinates stay runs of buckets, so the
// inner loop is a load, a sign flip, a shuffle and an addition. Two coordinates of one tile never collide, of two
// tiles with probability 1 / width. Signs come 128 to a draw and serve all rows of the batch.
//
// Only additions and sign flips: every instruction set gives the same bits. Coordinates are cut into parts whose
// number follows from the sizes alone, and the parts are added in a fixed tree: so does every thread count.
#include "cpu/project.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kRows = 8;              // rows that share the partial sums' memory
constexpr int64_t kMaxParts = 64;         // and so threads that can share one row
constexpr int64_t kPartFloats = 1 << 20;  // partial sums of one row: 32 MiB for 8 rows

struct Shape {
  int64_t width, group, block;  // buckets of a nonzero; gcd(width, 16); coordinates whose draws are made at once
};

Shape shape_of(const ProjectArgs& args) {
  Shape s;
  s.width = args.dim / args.nnz;
  s.group = min64(s.width & -s.width, kGroup);
  // Long enough to repay fetching a row's buckets; with several nonzeros short, to be read again from L2.
  const int64_t most = args.nnz == 1 ? min64(max64(32 * s.width / 128 * 128, 1 << 17), 1 << 20) : 1 << 16;
  s.block = max64(min64(most, s.width * 4096), 4096);  // few enough tiles
  return s;
}

// Draws for the coordinates [first, first + block), `first` a multiple of 128.
struct Draws {
  Scratch signs, keep, fair, tiles;
  int64_t sign_words, max_tiles;
  uint64_t first = 0, first_tile = 0;

  Draws(const ProjectArgs& args, const Shape& s)
      : signs(args.nnz * (s.block / 32 + 4 + 4 * kDrawsAtOnce)),
        keep(args.keep < kKeepAll ? s.block / 32 + 4 + 4 * kDrawsAtOnce : 1),
        fair(args.keep < kKeepAll ? s.block / 32 + 4 + 4 * kDrawsAtOnce : 1),
        tiles(args.nnz * 4 * (s.block / s.width + 2 + kDrawsAtOnce)),
        sign_words(s.block / 32 + 4 + 4 * kDrawsAtOnce),
        max_tiles(s.block / s.width + 2 + kDrawsAtOnce) {}

  uint32_t* sign_bits(int64_t j) const { return reinterpret_cast<uint32_t*>(signs.data()) + j * sign_words; }
  uint32_t* keep_bits() const { return reinterpret_cast<uint32_t*>(keep.data()); }
  uint32_t* tile_words(int64_t j) const { return reinterpret_cast<uint32_t*>(tiles.data()) + j * 4 * max_tiles; }

  void make(const ProjectArgs& args, const Shape& s, uint64_t begin, uint64_t end) {
    first = begin / 128 * 128;
    first_tile = begin / uint64_t(s.width);
    const int64_t n = int64_t(end - first), n_tiles = int64_t((end - 1) / uint64_t(s.width) - first_tile) + 1;
    for (int64_t j = 0; j < args.nnz; ++j) {
      draw_words(args.key, first / 128, (n + 127) / 128, kProjectSign, uint32_t(j), sign_bits(j));
      draw_words(args.key, first_tile, n_tiles, kProjectTile, uint32_t(j), tile_words(j));
    }
    if (args.keep < kKeepAll)
      draw_keep(args.key, args.keep, first, n, keep_bits(), reinterpret_cast<uint32_t*>(fair.data()));
  }
};

// Calls f(p, length, bucket, low): coordinates p + i go to buckets (bucket + i) ^ low, i < length, of nonzero j.
// In the order of the coordinates: reading memory in any other order costs more than buckets that stay in L1 save.
template <class F>
void for_runs(const Draws& draws, const Shape& s, int64_t j, uint64_t begin, uint64_t end, F&& f) {
  const uint32_t* words = draws.tile_words(j);
  const uint64_t width = uint64_t(s.width);
  uint64_t tile = begin / width;
  for (uint64_t p = begin; p < end; ++tile) {
    const uint32_t* word = words + 4 * (tile - draws.first_tile);
    const TilePlace place = tile_place(word[0], word[1], uint32_t(s.width), uint32_t(s.group));
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

uint32_t bit_of(const uint32_t* bits, uint64_t i) { return bits[i / 32] >> (i % 32) & 1; }

// 16 bits from a multiple of 16 on.
uint32_t group_bits(const uint32_t* bits, uint64_t i) {
  uint16_t piece;
  std::memcpy(&piece, reinterpret_cast<const char*>(bits) + i / 8, 2);  // little endian, as every machine served
  return piece;
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

template <class T, bool kKeep>
void add_run(const T* x, int64_t n, float* out, int64_t bucket, uint32_t low, const uint32_t* sign,
             const uint32_t* keep, uint64_t bit, bool whole_groups) {
  auto one = [&](int64_t i) {
    if (!kKeep || bit_of(keep, bit + uint64_t(i)))
      out[(bucket + i) ^ int64_t(low)] += flip_sign(to_float(x[i]), bit_of(sign, bit + uint64_t(i)));
  };
  int64_t i = 0;
  const int64_t head = whole_groups ? min64(n, int64_t(-bit & (kGroup - 1))) : n;
  for (; i < head; ++i) one(i);
  const Swap swap(low);
  constexpr int kVectors = kGroup / kLanes;
  auto groups = [&](auto count) {  // all loads of x before the first store: a store may not be passed
    constexpr int kCount = decltype(count)::value;
    Vec value[kCount][kVectors];
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g) {
      const uint32_t s = group_bits(sign, bit + uint64_t(i + g * kGroup));
      const uint32_t k = kKeep ? group_bits(keep, bit + uint64_t(i + g * kGroup)) : 0;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vec loaded = load_as_float(x + i + g * kGroup + v * kLanes);
        if (kKeep) loaded = keep_lanes(loaded, k >> (v * kLanes));
        value[g][v] = swap(flip_signs(loaded, s >> (v * kLanes)));
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + bucket + i + g * kGroup + ((v * kLanes) ^ swap.high);
        store(to, load(to) + value[g][v]);
      }
    i += kCount * kGroup;
  };
  while (i + 4 * kGroup <= n) groups(std::integral_constant<int, 4>{});
  while (i + kGroup <= n) groups(std::integral_constant<int, 1>{});
  for (; i < n; ++i) one(i);
}

// x = or += the signed numbers of the buckets.
template <bool kFirst>
void read_run(float* x, int64_t n, const float* y, int64_t bucket, uint32_t low, const uint32_t* sign, uint64_t bit,
              bool whole_groups) {
  auto one = [&](int64_t i) {
    const float value = flip_sign(y[(bucket + i) ^ int64_t(low)], bit_of(sign, bit + uint64_t(i)));
    x[i] = kFirst ? value : x[i] + value;
  };
  int64_t i = 0;
  const int64_t head = whole_groups ? min64(n, int64_t(-bit & (kGroup - 1))) : n;
  for (; i < head; ++i) one(i);
  const Swap swap(low);
  for (; i + kGroup <= n; i += kGroup) {
    const uint32_t s = group_bits(sign, bit + uint64_t(i));
    for (int64_t v = 0; v < kGroup; v += kLanes) {
      const Vec value = flip_signs(swap(load(y + bucket + i + (v ^ swap.high))), s >> v);
      store(x + i + v, kFirst ? value : load(x + i + v) + value);
    }
  }
  for (; i < n; ++i) one(i);
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

template <class T, bool kKeep>
void add_block(const ProjectArgs& args, const Shape& s, const Draws& draws, int64_t row, uint64_t begin, uint64_t end,
               float* out) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.row_stride;
  for (int64_t j = 0; j < args.nnz; ++j)
    for_runs(draws, s, j, begin, end, [&](uint64_t p, int64_t n, int64_t bucket, uint32_t low) {
      add_run<T, kKeep>(x + (p - args.offset), n, out + j * s.width, bucket, low, draws.sign_bits(j), draws.keep_bits(),
                        p - draws.first, s.group == kGroup);
    });
}

template <class T>
void forward(const ProjectArgs& args) {
  const Shape s = shape_of(args);
  const Blocks blocks(args, s);
  const int64_t by_memory = max64(1, kPartFloats / args.dim), by_work = max64(1, args.x.cols / (16 * args.dim));
  const int64_t parts = min64(min64(kMaxParts, blocks.count), min64(by_memory, by_work));
  const int64_t group = min64(kRows, args.x.rows), stride = group * args.dim;
  Scratch sums(parts * stride);
  for (int64_t row = 0; row < args.x.rows; row += group) {
    const int64_t rows = min64(group, args.x.rows - row), used = rows * args.dim;
    run_tasks(parts, args.n_threads, [&](int64_t part) {
      Draws draws(args, s);
      float* out = sums.data() + part * stride;
      std::memset(out, 0, size_t(used) * 4);
      for (int64_t b = blocks.count * part / parts; b < blocks.count * (part + 1) / parts; ++b) {
        const uint64_t begin = blocks.start(b), end = blocks.stop(b);
        draws.make(args, s, begin, end);
        for (int64_t r = 0; r < rows; ++r) {
          if (args.keep < kKeepAll)
            add_block<T, true>(args, s, draws, row + r, begin, end, out + r * args.dim);
          else
            add_block<T, false>(args, s, draws, row + r, begin, end, out + r * args.dim);
        }
      }
    });
    const int64_t piece = 1 << 14;
    run_tasks((used + piece - 1) / piece, args.n_threads, [&](int64_t task) {
      const int64_t begin = task * piece, end = min64(used, begin + piece);
      add_tree(sums.data(), parts, stride, begin, end);
      for (int64_t i = begin; i < end; ++i)
        args.y[(row + i / args.dim) * args.y_stride + i % args.dim] += args.scale * sums.data()[i];
    });
  }
}

}  // namespace

void project_sparse(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  with_dtype(args.x.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(args); });
}

void project_sparse_adjoint(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  const Shape s = shape_of(args);
  const Blocks blocks(args, s);
  run_tasks(blocks.count, args.n_threads, [&](int64_t b) {
    const uint64_t begin = blocks.start(b), end = blocks.stop(b);
    Draws draws(args, s);
    draws.make(args, s, begin, end);
    for (int64_t row = 0; row < args.x.rows; ++row) {
      float* x = static_cast<float*>(const_cast<void*>(args.x.data)) + row * args.x.row_stride;
      const float* y = args.y + row * args.y_stride;
      for (int64_t j = 0; j < args.nnz; ++j)
        for_runs(draws, s, j, begin, end, [&](uint64_t p, int64_t n, int64_t bucket, uint32_t low) {
          const auto read = j == 0 ? read_run<true> : read_run<false>;
          read(x + (p - args.offset), n, y + j * s.width, bucket, low, draws.sign_bits(j), p - draws.first,
               s.group == kGroup);
        });
      const uint32_t* keep = draws.keep_bits();
      float* to = x + (begin - args.offset);
      for (int64_t i = 0; i < int64_t(end - begin); ++i) {
        const bool kept = args.keep == kKeepAll || bit_of(keep, begin - draws.first + uint64_t(i));
        to[i] = kept ? args.scale * to[i] : 0.0f;
      }
    }
  });
}

}  // namespace cropi::CROPI_ISA
