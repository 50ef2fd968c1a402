// CountSketch and SJLT of rows that exist, at the speed of reading them (docs/project.md has the formula).
//
// Coordinates are cut into tiles as wide as the buckets of one nonzero. A tile is added to the buckets shifted by a
// hashed multiple of 16 and XORed with a hashed number below 16: runs of coordinates stay runs of buckets, so the
// inner loop is a load, a sign flip, a shuffle and an addition. Two coordinates of one tile never collide, of two
// tiles with probability 1 / width. Signs come 128 to a draw and serve all rows of the batch.
//
// Only additions and sign flips: every instruction set gives the same bits. Coordinates are cut into parts whose
// number follows from the sizes alone, and the parts are added in a fixed tree: so does every thread count.
#include "cpu/project_sparse.h"
#include "cpu/partial_sums.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kRows = 8;              // rows that share the partial sums' memory
constexpr int64_t kMaxParts = 64;         // and so threads that can share one row
constexpr int64_t kTileAlone = 512;       // narrower tiles are added one by one: less to set up,
constexpr int64_t kTilesBy8 = 8192;       // up to here 8 together are faster than 4
constexpr int64_t kPartFloats = 1 << 20;  // partial sums of one row, all parts together

// Coordinates in their order, any run of them. A vector holds whole groups when it begins at a bucket that is a multiple
// of `group`: `low` is below that, so lanes change places within the vector. With groups of 16, 16 coordinates have
// their bits at a multiple of 16 too; with narrower ones (kWhole false) anywhere.
template <class T, bool kKeep, bool kWhole>
void add_run(const T* x, int64_t n, float* out, int64_t bucket, uint32_t low, const uint32_t* sign,
             const uint32_t* keep, uint64_t bit, int64_t group) {
  auto one = [&](int64_t i) {
    if (!kKeep || bit_of(keep, bit + uint64_t(i)))
      out[(bucket + i) ^ int64_t(low)] += flip_sign(to_float(x[i]), bit_of(sign, bit + uint64_t(i)));
  };
  int64_t i = 0;
  const int64_t head = min64(n, -bucket & (group - 1));
  for (; i < head; ++i) one(i);
  const Reader<T> reader(low);
  constexpr int kVectors = kGroup / kLanes;
  auto groups = [&](auto count) {  // all loads of x before the first store: a store may not be passed
    constexpr int kCount = decltype(count)::value;
    Vec value[kCount][kVectors];
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = i + g * kGroup, lane = v * kLanes;
        const uint32_t s = vector_bits<kWhole>(sign, bit + uint64_t(at), lane);
        const uint32_t k = kKeep ? vector_bits<kWhole>(keep, bit + uint64_t(at), lane) : 0;
        value[g][v] = reader.template read<kKeep>(x + at + lane, s, k);
      }
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + bucket + i + g * kGroup + ((v * kLanes) ^ reader.high());
        store(to, load(to) + value[g][v]);
      }
    i += kCount * kGroup;
  };
  while (i + 4 * kGroup <= n) groups(std::integral_constant<int, 4>{});
  while (i + kGroup <= n) groups(std::integral_constant<int, 1>{});
  for (; i < n; ++i) one(i);
}

// kTiles whole tiles at once, in the order of the buckets. Several tiles are several streams of memory, which arrive
// faster than one, and every bucket is fetched once for all of them.
template <class T, bool kKeep, int kTiles>
void add_tiles(const T* x, int64_t width, const TilePlace* place, float* out, const uint32_t* sign,
               const uint32_t* keep, uint64_t bit) {
  constexpr int kVectors = kGroup / kLanes;
  alignas(Reader<T>) char memory[kTiles * sizeof(Reader<T>)];
  Reader<T>* reader = reinterpret_cast<Reader<T>*>(memory);
  for (int q = 0; q < kTiles; ++q) new (reader + q) Reader<T>(place[q].low);
  const auto bytes = [](const uint32_t* bits, uint64_t at) { return reinterpret_cast<const uint8_t*>(bits) + at / 8; };
  for (int64_t bucket = 0, next; bucket < width; bucket = next) {
    next = width;  // the first bucket where a tile starts again, or all end
    for (int q = 0; q < kTiles; ++q)
      if (place[q].shift > bucket && place[q].shift < next) next = place[q].shift;
    // Where the vectors of the first group lie, and their bits: all move on by one count from group to group.
    constexpr int kLoads = kBitsOfVectors ? kVectors : 1;
    const T* from[kTiles][kVectors];
    const uint8_t *signs[kTiles][kLoads], *keeps[kTiles][kLoads];
    for (int q = 0; q < kTiles; ++q) {
      const int64_t shift = place[q].shift, group = q * width + bucket - shift + (bucket < shift ? width : 0);
      for (int v = 0; v < kVectors; ++v) from[q][v] = x + group + ((v * kLanes) ^ reader[q].high());
      for (int v = 0; v < kLoads; ++v) {
        const uint64_t at = bit + uint64_t(kBitsOfVectors ? from[q][v] - x : group);
        signs[q][v] = bytes(sign, at);
        if (kKeep) keeps[q][v] = bytes(keep, at);
      }
    }
    float* to = out + bucket;
    const int64_t n = next - bucket;
    for (int64_t i = 0, byte = 0; i < n; i += kGroup, byte += kGroup / 8) {
      Vec sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = load(to + i + v * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const uint64_t shift = kBitsOfVectors ? 0 : uint64_t((v * kLanes) ^ reader[q].high());
          const uint32_t s = some_bits(signs[q][v % kLoads] + byte, shift);
          const uint32_t k = kKeep ? some_bits(keeps[q][v % kLoads] + byte, shift) : 0;
          sum[v] += reader[q].template read<kKeep>(from[q][v] + i, s, k);
        }
      for (int v = 0; v < kVectors; ++v) store(to + i + v * kLanes, sum[v]);
    }
  }
}

template <class T, bool kKeep>
void add_block(const ProjectArgs& args, const Shape& s, const Draws& draws, int64_t row, uint64_t begin, uint64_t end,
               float* out) {
  const T* x = row_of<T>(args.x, row);
  const uint64_t width = uint64_t(s.width);
  for (int64_t j = 0; j < args.nnz; ++j) {
    float* to = out + j * s.width;
    const uint32_t *sign = draws.sign_bits(j), *keep = draws.keep_bits();
    auto runs = [&](uint64_t first, uint64_t last) {
      for_runs(draws, s, j, first, last, [&](uint64_t p, int64_t n, int64_t bucket, uint32_t low) {
        const auto run = s.group == kGroup ? add_run<T, kKeep, true> : add_run<T, kKeep, false>;
        run(x + (p - args.offset), n, to, bucket, low, sign, keep, p - draws.first, s.group);
      });
    };
    auto tiles = [&](auto count, uint64_t p) {
      constexpr int kTiles = decltype(count)::value;
      TilePlace place[kTiles];
      for (int q = 0; q < kTiles; ++q) place[q] = draws.place(s, j, p / width + uint64_t(q));
      add_tiles<T, kKeep, kTiles>(x + (p - args.offset), s.width, place, to, sign, keep, p - draws.first);
    };
    uint64_t p = (begin + width - 1) / width * width;  // the first whole tile
    if (s.group < kGroup || s.width < kTileAlone || p > end) p = end;
    runs(begin, p);
    if (s.width <= kTilesBy8)
      for (; p + 8 * width <= end; p += 8 * width) tiles(std::integral_constant<int, 8>{}, p);
    for (; p + 4 * width <= end; p += 4 * width) tiles(std::integral_constant<int, 4>{}, p);
    runs(p, end);
  }
}

template <class T>
void forward(const ProjectArgs& args) {
  const Shape s = shape_of(args);
  const Blocks blocks(args, s);
  const int64_t by_memory = max64(1, kPartFloats / args.dim), by_work = max64(1, args.x.cols / (16 * args.dim));
  const int64_t parts = min64(min64(kMaxParts, blocks.count), min64(by_memory, by_work));
  for (int64_t row = 0; row < args.x.rows; row += kRows) {
    const int64_t rows = min64(kRows, args.x.rows - row), used = rows * args.dim;
    PartialSums sums(parts, used);
    run_tasks(parts, args.n_threads, [&](int64_t part) {
      Draws draws(args, s);
      float* out = sums.begin(part);
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
      sums.finish(part);
    });
    for (int64_t i = 0; i < used; ++i)
      args.y[(row + i / args.dim) * args.y_stride + i % args.dim] += args.scale * sums.total()[i];
  }
}

}  // namespace

void project_sparse(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  with_dtype(args.x.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace cropi::CROPI_ISA
