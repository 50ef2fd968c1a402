// CountSketch and SJLT of rows: every sum stays in a register of the one thread that owns its bucket.
//
// A thread goes through the stages of its part and fetches, for each of its buckets, the coordinate that lands there:
// runs of 16 coordinates stay runs of buckets (docs/project.md), so a fetch is one aligned 16-byte load whose address
// holds the rotation and the upper bits of the XOR; the lower ones permute registers. No atomics, no hash per element:
// 128 signs are one draw, shared through shared memory, and the draws of the next stage are made while the loads of
// this one are on their way.
#pragma once
#include "cuda/elements.h"
#include "cuda/project_shape.h"

namespace cropi::gpu {

// What a stage needs to be drawn. A unit is one tile for one nonzero.
struct SparseStage {
  struct Unit {
    uint32_t place;     // shift + low
    int32_t sign_base;  // coordinate i of the tile has bit sign_base + i of `sign`
    int32_t keep_base;  // and bit keep_base + i of `keep`
    int32_t at;         // first coordinate of the tile, counted from that of the stage
  };
  Unit unit[kMaxUnits];
  uint32_t sign[4 * kThreads], keep[4 * kThreads];
  // Where the width is cut into pieces, a piece may come from the end and the beginning of a tile: coordinates below
  // `wrap` have bit wrapped_base + i instead.
  uint32_t wrap;
  int32_t wrapped_base;
};

template <class T, int kCount, bool kKeep>
struct ProjectSparse {
  static constexpr int kRuns = kSlots / (kThreads * kCount);  // of a thread
  static constexpr int kFlight = kCount == 1 ? 8 : 4;         // loads on their way at once
  static constexpr int kBlockThreads = kThreads, kBlocksPerMultiprocessor = 2;
  static constexpr int kFlushSlots = 4096, kFlushRuns = kFlushSlots / (kThreads * kCount);

  union Shared {
    SparseStage stage[2];
    float flush[kFlushSlots];
  };
  struct State {
    float sum[kRuns * kCount];
  };

  ProjectCall call;
  SparseShape shape;
  uint32_t reciprocal;  // of span / kCount, times 2^31
  float* partial;       // [rows, parts, dim]

  // Block (slice, part, row).
  CROPI_HD void operator()(Block block, Shared& shared) const {
    const T* row = static_cast<const T*>(call.x) + block.z * call.x_stride;
    const Slice slice(shape, block.x);
    const int64_t begin = shape.stages * block.y / shape.parts, end = shape.stages * (block.y + 1) / shape.parts;
    Threads<kThreads, State> threads;
    threads.each([&](int thread, State& state) {
      CROPI_UNROLL
      for (int i = 0; i < kRuns * kCount; ++i) state.sum[i] = 0.0f;
      draw(slice, begin, thread, shared.stage[0]);
    });
    threads.sync();
    const int count = int(end - begin);
    for (int s = 0; s < count; ++s) {
      threads.each([&](int thread, State& state) {
        SparseStage* next = s + 1 < count ? &shared.stage[(s + 1) & 1] : nullptr;
        add_stage(row, slice, begin + recomputed(s), recomputed(thread), shared.stage[s & 1], next, state);
      });
      threads.sync();
    }
    flush(slice, partial + (block.z * shape.parts + block.y) * call.dim, threads, shared);
  }

 private:
  struct Slice {
    uint32_t nonzero, nonzeros, first, span;  // nonzeros, and their buckets [first, first + span)
    CROPI_HD Slice(const SparseShape& shape, int64_t index) {
      nonzero = uint32_t(index / shape.pieces) * shape.nonzeros;
      nonzeros = shape.nnz - nonzero < shape.nonzeros ? shape.nnz - nonzero : shape.nonzeros;
      first = uint32_t(index % shape.pieces) * shape.span;
      span = shape.width - first < shape.span ? shape.width - first : shape.span;
    }
  };

  CROPI_HD uint64_t start_of(int64_t stage) const {
    return uint64_t(shape.first_stage + stage) * shape.tiles * shape.width;
  }

  CROPI_HD uint32_t place_of(uint64_t tile, uint32_t nonzero) const {
    const TilePlace place = draw_tile_place(call.key, tile, nonzero, shape.width, shape.group);
    return place.shift + place.low;
  }

  CROPI_HD void draw(const Slice& slice, int64_t s, int thread, SparseStage& to) const {
    const uint64_t start = start_of(s), tile = uint64_t(shape.first_stage + s) * shape.tiles;
    const int32_t phase = int32_t(start & 127);
    const uint32_t index = uint32_t(thread);
    uint64_t block = start / 128;
    if (shape.pieces == 1) {
      const uint32_t nonzero = index / shape.draws, units = shape.tiles * slice.nonzeros;
      const uint32_t mirrored = kThreads - 1 - index;  // so that the tiles' draws fall to threads without signs
      if (mirrored < units) {
        const uint32_t z = mirrored / slice.nonzeros, j = mirrored % slice.nonzeros;
        const int32_t at = int32_t(z * shape.width);
        to.unit[mirrored] = {place_of(tile + z, slice.nonzero + j), int32_t(j * shape.draws * 128) + phase + at,
                             phase + at, at};
      }
      if (index == 0) to.wrap = 0;
      block += index - nonzero * shape.draws;
      if (nonzero < slice.nonzeros) draw_signs(block, slice.nonzero + nonzero, index, to);
      if (kKeep && nonzero == 0) draw_keep(block, index, to);
      return;
    }
    const uint32_t place = place_of(tile, slice.nonzero), shift = place & ~(shape.group - 1);
    const uint32_t from = slice.first >= shift ? slice.first - shift : slice.first + shape.width - shift;
    const uint32_t last = from + slice.span <= shape.width ? from + slice.span : shape.width;  // of the tile's end
    const uint64_t head = (start + from) / 128;
    const uint32_t head_draws = uint32_t((start + last - 1) / 128 - head) + 1, rest = from + slice.span - last;
    const uint32_t rest_draws = rest == 0 ? 0 : uint32_t((start + rest - 1) / 128 - block) + 1;
    if (index == 0) {
      const int32_t base = int32_t(int64_t(start - head * 128));
      to.unit[0] = {place, base, base, 0};
      to.wrap = from, to.wrapped_base = int32_t(head_draws * 128) + phase;
    }
    block = index < head_draws ? head + index : block + (index - head_draws);
    if (index >= head_draws + rest_draws) return;
    draw_signs(block, slice.nonzero, index, to);
    if (kKeep) draw_keep(block, index, to);
  }

  CROPI_HD void draw_signs(uint64_t block, uint32_t nonzero, uint32_t index, SparseStage& to) const {
    const Draw d = project_draw(call.key, block, kProjectSign, nonzero);
    CROPI_UNROLL
    for (int w = 0; w < 4; ++w) to.sign[4 * index + w] = d.w[w];
  }

  CROPI_HD void draw_keep(uint64_t block, uint32_t index, SparseStage& to) const {
    const Draw kept = draw_keep_mask(call.key, block, uint32_t(call.keep));
    CROPI_UNROLL
    for (int w = 0; w < 4; ++w) to.keep[4 * index + w] = kept.w[w];
  }

  // The run of buckets that a thread's r-th run of slots stands for, and where its coordinates are.
  struct Source {
    int32_t at;       // from the stage's first coordinate
    uint32_t change;  // sign bits, keep bits << 8, low << 16: one register until the load is back
    bool used;
  };

  CROPI_HD Source source(const Slice& slice, int thread, int r, const SparseStage& stage) const {
    Source source{};
    const uint32_t run = uint32_t(r * kThreads + thread), per_unit = slice.span / kCount;
    // The reciprocal is that of a whole span; a last, shorter piece has one unit.
    const uint32_t unit = shape.pieces == 1 ? uint32_t(uint64_t(run) * reciprocal >> 31) : 0;
    source.used = shape.pieces == 1 ? unit < shape.tiles * slice.nonzeros : run < per_unit;
    if (!source.used) return source;
    const SparseStage::Unit u = stage.unit[unit];
    const uint32_t shift = u.place & ~(shape.group - 1), low = u.place & (shape.group - 1);
    const uint32_t bucket = (slice.first + (run - unit * per_unit) * kCount) ^ (low & ~uint32_t(kCount - 1));
    const uint32_t i = bucket >= shift ? bucket - shift : bucket + shape.width - shift;
    const bool wrapped = i < stage.wrap;
    const uint32_t sign = uint32_t((wrapped ? stage.wrapped_base : u.sign_base) + int32_t(i));
    source.at = u.at + int32_t(i);
    source.change = bits_at(stage.sign, sign) | (low & uint32_t(kCount - 1)) << 16;
    if (kKeep)
      source.change |= bits_at(stage.keep, uint32_t((wrapped ? stage.wrapped_base : u.keep_base) + int32_t(i))) << 8;
    return source;
  }

  // The kCount bits from a multiple of kCount on, in the low bits.
  CROPI_HD static uint32_t bits_at(const uint32_t* words, uint32_t bit) {
    return reinterpret_cast<const uint8_t*>(words)[bit >> 3] >> (bit & 7) & ((1u << kCount) - 1);
  }

  CROPI_HD void add_stage(const T* row, const Slice& slice, int64_t s, int thread, const SparseStage& stage,
                          SparseStage* next, State& state) const {
    // The call's coordinates among those of the stage: all of them, except at its ends.
    const int64_t column = int64_t(start_of(s) - call.offset), length = int64_t(shape.tiles) * shape.width;
    const int32_t begin = int32_t(max64(0, -column)), end = int32_t(min64(length, call.n - column));
    const T* x = row + column;
    if (begin == 0 && end == int32_t(length)) return add_whole(x, slice, s, thread, stage, next, state);
    CROPI_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      Run<T, kCount> run;
      const Source from = source(slice, thread, r, stage);
      run.load_inside(x, from.at, begin, from.used ? end : 0);
      add(run, from.change, r, state);
    }
    if (next) draw(slice, s + 1, thread, *next);
  }

  CROPI_HD void add_whole(const T* x, const Slice& slice, int64_t s, int thread, const SparseStage& stage,
                          SparseStage* next, State& state) const {
    CROPI_UNROLL
    for (int first = 0; first < kRuns; first += kFlight) {
      Run<T, kCount> run[kFlight];
      uint32_t change[kFlight];
      CROPI_UNROLL
      for (int r = 0; r < kFlight; ++r) {
        const Source from = source(slice, thread, first + r, stage);
        run[r].clear();
        if (from.used) run[r].load(x + from.at);
        change[r] = from.change;
      }
      if (first == 0 && next) draw(slice, s + 1, thread, *next);
      CROPI_UNROLL
      for (int r = 0; r < kFlight; ++r) add(run[r], change[r], first + r, state);
    }
  }

  CROPI_HD static void add(Run<T, kCount>& run, uint32_t change, int r, State& state) {
    if (kKeep) run.keep(change >> 8 & 0xff);
    run.flip(change & 0xff);
    run.permute(change >> 16);
    run.add_to(state.sum + r * kCount);
  }

  // Sums the stage's tiles and writes the slice's buckets, a part of the slots at a time through shared memory.
  CROPI_HD void flush(const Slice& slice, float* out, Threads<kThreads, State>& threads, Shared& shared) const {
    const int buckets = int(slice.nonzeros * slice.span), used = buckets * int(shape.tiles);
    out += int64_t(slice.nonzero) * shape.width + slice.first;
    CROPI_UNROLL
    for (int first = 0; first < kRuns; first += kFlushRuns) {
      const int begin = first * kThreads * kCount, end = int(min64(used, begin + kFlushSlots));
      threads.each([&](int thread, State& state) {
        CROPI_UNROLL
        for (int r = 0; r < kFlushRuns; ++r) CROPI_UNROLL
        for (int e = 0; e < kCount; ++e)
          shared.flush[(r * kThreads + thread) * kCount + e] = state.sum[(first + r) * kCount + e];
      });
      threads.sync();
      threads.each([&](int thread, State&) {
        for (int bucket = thread; bucket < buckets; bucket += kThreads) {
          int slot = bucket < begin ? bucket + int(divide_up(begin - bucket, buckets)) * buckets : bucket;
          float sum = begin == 0 ? 0.0f : out[bucket];
          for (; slot < end; slot += buckets) sum += shared.flush[slot - begin];
          out[bucket] = sum;
        }
      });
      threads.sync();
    }
  }
};

// y[row, c] += scale * the sum over parts of partial[row, part, c]. Block (32 columns, row).
struct AddParts {
  static constexpr int kWays = 8, kColumns = 32;
  static constexpr int kBlockThreads = kWays * kColumns, kBlocksPerMultiprocessor = 4;
  struct Shared {
    float sum[kWays][kColumns];
  };

  const float* partial;
  float* y;
  int64_t parts, dim, y_stride;
  float scale;

  CROPI_HD void operator()(Block block, Shared& shared) const {
    Threads<kBlockThreads, Nothing> threads;
    threads.each([&](int thread, Nothing&) {
      const int64_t column = block.x * kColumns + thread % kColumns;
      float sum = 0.0f;
      if (column < dim)
        for (int64_t part = thread / kColumns; part < parts; part += kWays)
          sum += partial[(block.y * parts + part) * dim + column];
      shared.sum[thread / kColumns][thread % kColumns] = sum;
    });
    threads.sync();
    threads.each([&](int thread, Nothing&) {
      const int64_t column = block.x * kColumns + thread;
      if (thread >= kColumns || column >= dim) return;
      float sum = shared.sum[0][thread];
      for (int way = 1; way < kWays; ++way) sum += shared.sum[way][thread];
      float& out = y[block.y * y_stride + column];
      out = scaled_sum(out, scale, sum);
    });
  }
};

}  // namespace cropi::gpu
