// CountSketch and SJLT of rows whose tiles are wide: a warp owns 1024 buckets of one nonzero and goes through the tiles
// of its part alone.
//
// As in project_sparse.h every sum stays in a register, and a run of 16 bytes is fetched by one load. Here the warp's
// buckets come from one contiguous piece of every tile (two where it turns over the tile's end), the same for all of
// its runs: an address, a table of signs and a permutation for each tile, and none of the tables that many tiles in one
// block need. The loads of two tiles are on their way while two are added, and no warp waits for another one.
#pragma once
#include "cuda/elements.h"
#include "cuda/project_shape.h"

namespace cropi::gpu {

constexpr int kWarp = 32;
constexpr int kTileBuckets = 1024;        // of a warp
constexpr int64_t kTileWarps = 132 * 16;  // those that an H100 holds at once
constexpr int64_t kTilesPerPart = 16;     // at least
constexpr int kHeldPlaces = 2 * kWarp;    // a power of two
constexpr int kDrawsOfTile = kWarp / 2;   // lanes that draw the signs of one tile: 1024 / 128 and 3, at most
static_assert(kTileBuckets / 128 + 3 <= kDrawsOfTile, "two tiles are drawn at once");

struct TilesShape {
  uint32_t width, pieces, span;  // buckets of a nonzero; warps of a nonzero; buckets of a warp, fewer for the last one
  int64_t first_tile, tiles, parts;

  TilesShape() = default;
  explicit TilesShape(const ProjectCall& call) {
    width = uint32_t(call.dim / call.nnz);
    pieces = uint32_t(divide_up(width, kTileBuckets));
    span = uint32_t(divide_up(divide_up(width, pieces), 16) * 16);
    first_tile = int64_t(call.offset / width);
    tiles = call.n == 0 ? 0 : int64_t((call.offset + uint64_t(call.n) - 1) / width) - first_tile + 1;
    parts = max64(1, min64(max64(1, kTileWarps / (int64_t(pieces) * call.nnz)), tiles / kTilesPerPart));
  }

  // By the sizes alone: whoever is served here has the same bits for any dtype and alignment.
  static bool serves(const ProjectCall& call) {
    const int64_t width = call.dim / call.nnz;
    return width >= kTileBuckets && width % 16 == 0;
  }
};

// Block (nonzero and piece, part, row).
template <class T, bool kAligned, bool kKeep>
struct ProjectTiles {
  static constexpr int kCount = 16 / int(sizeof(T)), kRuns = kTileBuckets / (kWarp * kCount);  // of a lane
  static constexpr int kBlockThreads = kWarp, kBlocksPerMultiprocessor = 16;
  using Elements = Run<T, kCount>;

  struct Shared {
    uint32_t place[kHeldPlaces];  // shift + low of tile s of the part, at s % kHeldPlaces
    uint32_t sign[2][kDrawsOfTile * 4], keep[2][kDrawsOfTile * 4];
  };
  struct State {
    float sum[kRuns * kCount];
    Elements run[2][kRuns];
  };

  ProjectCall call;
  TilesShape shape;
  float* partial;  // [rows, parts, dim]

  CROPI_HD void operator()(Block block, Shared& shared) const {
    const Piece piece(shape, block.x);
    const T* row = static_cast<const T*>(call.x) + block.z * call.x_stride;
    const int64_t begin = shape.tiles * block.y / shape.parts, end = shape.tiles * (block.y + 1) / shape.parts;
    const int64_t first = shape.first_tile + begin;
    const int count = int(end - begin);
    Threads<kWarp, State> threads;
    threads.each([&](int lane, State& state) {
      CROPI_UNROLL
      for (int i = 0; i < kRuns * kCount; ++i) state.sum[i] = 0.0f;
      CROPI_UNROLL
      for (int i = 0; i < kHeldPlaces; i += kWarp) shared.place[i + lane] = place_of(first + i + lane, piece);
    });
    threads.sync();
    threads.each([&](int lane, State& state) {
      CROPI_UNROLL
      for (int i = 0; i < 2; ++i)
        if (i < count) load(row, piece, first + i, shared.place[i], lane, state.run[i]);
    });
    for (int s = 0; s < count; s += 2) {
      threads.sync();
      threads.each([&](int lane, State&) { draw(piece, first + s, s, lane, shared); });
      threads.sync();
      threads.each([&](int lane, State& state) {
        CROPI_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (s + i < count) add(piece, first + s + i, shared.place[(s + i) % kHeldPlaces], i, lane, shared, state);
          const int next = s + i + 2;
          if (next < count) load(row, piece, first + next, shared.place[next % kHeldPlaces], lane, state.run[i]);
        }
      });
      if ((s + 2) % kWarp == 0) {  // the tiles before are done: their places make room
        threads.sync();
        threads.each([&](int lane, State&) {
          const int at = s + 2 + kWarp + lane;
          shared.place[at % kHeldPlaces] = place_of(first + at, piece);
        });
      }
    }
    float* out = partial + (block.z * shape.parts + block.y) * call.dim + int64_t(piece.nonzero) * shape.width;
    threads.each([&](int lane, State& state) {
      CROPI_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        const int at = (lane + kWarp * r) * kCount;
        if (at >= int(piece.span)) continue;
        CROPI_UNROLL
        for (int e = 0; e < kCount; ++e) out[piece.first + at + e] = state.sum[r * kCount + e];
      }
    });
  }

 private:
  struct Piece {
    uint32_t nonzero, first, span;  // buckets [first, first + span) of a nonzero
    CROPI_HD Piece(const TilesShape& shape, int64_t index) {
      nonzero = uint32_t(index / shape.pieces);
      first = uint32_t(index % shape.pieces) * shape.span;
      span = shape.width - first < shape.span ? shape.width - first : shape.span;
    }
  };

  CROPI_HD uint32_t place_of(int64_t tile, const Piece& piece) const {
    const TilePlace place = draw_tile_place(call.key, uint64_t(tile), piece.nonzero, shape.width, 16);
    return place.shift + place.low;
  }

  // The coordinate, within a tile, that lands in the piece's first bucket, the XOR left aside.
  CROPI_HD uint32_t from_of(const Piece& piece, uint32_t place) const {
    const uint32_t shift = place & ~15u;
    return piece.first >= shift ? piece.first - shift : piece.first + shape.width - shift;
  }

  // The run among the piece's that lands in the lane's first one: the upper bits of the XOR.
  CROPI_HD static int source_of(uint32_t place, int lane) { return lane ^ int((place & 15u) / kCount); }

  CROPI_HD void load(const T* row, const Piece& piece, int64_t tile, uint32_t place, int lane,
                     Elements (&to)[kRuns]) const {
    const int64_t column = int64_t(uint64_t(tile) * shape.width - call.offset);
    const int from = int(from_of(piece, place)), source = source_of(place, lane), width = int(shape.width);
    const bool whole = column >= 0 && column + width <= call.n;
    if (kAligned && whole) {
      const T* x = row + column + from + source * kCount;
      CROPI_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        const int at = (source + kWarp * r) * kCount;
        to[r].clear();
        if (at < int(piece.span)) to[r].load((from + at < width ? x : x - width) + kWarp * r * kCount);
      }
      return;
    }
    const int32_t begin = int32_t(max64(0, -column)), end = int32_t(min64(width, call.n - column));
    CROPI_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int at = (source + kWarp * r) * kCount;
      to[r].load_inside(row + column, from + at < width ? from + at : from + at - width, begin,
                        at < int(piece.span) ? end : 0);
    }
  }

  // Where a piece's signs are: those up to the tile's end in the first draws, those from its beginning on behind them.
  struct Draws {
    uint64_t start, head;  // the tile's first coordinate; the first draw
    int from, heads;
    CROPI_HD Draws(const Piece& piece, int64_t tile, uint32_t width, uint32_t from_) : from(int(from_)) {
      start = uint64_t(tile) * width, head = (start + from_) / 128;
      const uint32_t last = from_ + piece.span <= width ? from_ + piece.span : width;
      heads = int((start + last - 1) / 128 - head) + 1;
    }
  };

  // Half of the lanes draw for tile `first`, half for the next one.
  CROPI_HD void draw(const Piece& piece, int64_t first, int s, int lane, Shared& shared) const {
    const int which = lane / kDrawsOfTile, index = lane % kDrawsOfTile;
    const Draws draws(piece, first + which, shape.width, from_of(piece, shared.place[(s + which) % kHeldPlaces]));
    const uint64_t block = index < draws.heads ? draws.head + index : draws.start / 128 + (index - draws.heads);
    const Draw sign = project_draw(call.key, block, kProjectSign, piece.nonzero);
    CROPI_UNROLL
    for (int w = 0; w < 4; ++w) shared.sign[which][4 * index + w] = sign.w[w];
    if (!kKeep) return;
    const Draw kept = draw_keep_mask(call.key, block, uint32_t(call.keep));
    CROPI_UNROLL
    for (int w = 0; w < 4; ++w) shared.keep[which][4 * index + w] = kept.w[w];
  }

  CROPI_HD void add(const Piece& piece, int64_t tile, uint32_t place, int which, int lane, const Shared& shared,
                    State& state) const {
    const Draws draws(piece, tile, shape.width, from_of(piece, place));
    const int source = source_of(place, lane), turn = (int(shape.width) - draws.from) / kCount;
    const int bits = source + int((draws.start + draws.from) % 128) / kCount;
    const int turned = source + (draws.heads * 128 + int(draws.start % 128)) / kCount - turn;
    CROPI_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int at = (source + kWarp * r < turn ? bits : turned) + kWarp * r;
      Elements& run = state.run[which][r];
      if (kKeep) run.keep(bits_at(shared.keep[which], at));
      run.flip(bits_at(shared.sign[which], at));
      run.permute(place & uint32_t(kCount - 1));
      run.add_to(state.sum + r * kCount);
    }
  }

  // The bits of a run: a byte or half of one.
  CROPI_HD static uint32_t bits_at(const uint32_t* words, int run) {
    const auto bytes = reinterpret_cast<const uint8_t*>(words);
    return kCount == 8 ? bytes[run] : bytes[run / 2] >> (run % 2 * 4) & 15u;
  }
};

}  // namespace cropi::gpu
