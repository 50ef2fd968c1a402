// The slab sketch of D^T A per segment: a matrix product whose tiles are flushed, with a sign and an XOR of their
// address, into the few thousand numbers of the sketch. No [rows, cols] buffer exists.
//
// Work is split by the rows of the slab, so a task owns what it writes: the result is the same for any thread
// count. XORs are multiples of 8, so an aligned unit of 16 slab rows is fed by an aligned unit of 16 rows of each
// block, and each token of it is one whole cache line.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kUnit = 16;     // slab rows owned by a task
constexpr int64_t kTokens = 256;  // tokens between flushes: a packed strip and a tile of A stay in L1
// A register tile: kTileRows x kTileCols sums. 16 zmm (v4), 8 ymm (v3), 8 xmm (v1) accumulators.
#if defined(CROPI_ISA_v4)
constexpr int kTileRows = 8, kTileCols = 32;
#elif defined(CROPI_ISA_v3)
constexpr int kTileRows = 4, kTileCols = 16;
#else
constexpr int kTileRows = 4, kTileCols = 8;
#endif

int64_t tiles_of(int64_t cols) { return ceil_div(cols, kTileCols); }

// Tokens of one operand: token t starts at data + t * step. Float32 operands are read where they lie; others, and edges,
// from a packed copy.
struct Tokens {
  const float* data;
  int64_t step;
  Tokens from(int64_t column) const { return {data + column, step}; }
};

// How far ahead of the products D is fetched: its rows lie kilobytes apart, where no hardware prefetcher follows, and a
// strip that is copied first waits for memory while the arithmetic stands still (1.5 times the time of the products).
// So the first tile copies while it multiplies. The tiles after it would find rows that far apart in few sets of L1:
// read from the strip they take 0.71 to 0.82 of the time (v3, matrices of 576 and 1536 rows, width 64).
constexpr int64_t kAhead = 32;

// Where a tile's sums go: row i to `rows` + i * slab_cols, with signs[i]; column c to c ^ col_xor, c from `column` on.
struct Flush {
  float* rows;
  const float* signs;
  int64_t slab_cols, column, col_xor;
};

// row[c ^ col_xor] += sign * sums, c = column + lane. The XOR is a multiple of 8: it moves whole vectors and, within one
// of 16 lanes, swaps its halves. From the registers at once: by way of memory the flush took a tenth of the time of
// segments of 85 tokens.
inline void add_lanes(float* row, const Flush& to, int64_t column, float sign, Vec sums) {
#if defined(CROPI_ISA_v4)
  if (to.slab_cols < kLanes) {  // a slab of 8 columns: the rest of the vector is 0
    const Vec8 low = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7);
    store8(row, load8(row) + sign * low);
    return;
  }
  if (to.col_xor & 8) sums = __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
  float* dst = row + (column ^ (to.col_xor & ~int64_t(kLanes - 1)));
  store(dst, load(dst) + sign * sums);
}

// Adds the sum over n tokens of d[t][kTileRows]^T a[t][kTileCols] to the slab. With kFetch, d is the first of a unit's
// columns, which are fetched ahead and copied to strip[t][kUnit].
template <bool kFetch>
void multiply_tile(int64_t n, Tokens d, Tokens a, const Flush& to, float* strip) {
  constexpr int kVecs = kTileCols / kLanes;
  Vec acc[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
  const int64_t ahead = kAhead * d.step;
  for (int64_t t = 0; t < n; ++t, d.data += d.step, a.data += a.step) {
    if (kFetch) {
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(d.data) + size_t(ahead) * 4), 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < kUnit; i += kLanes) store(strip + t * kUnit + i, load(d.data + i));
    }
    Vec b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = load(a.data + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec x = d.data[i] - Vec{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const int64_t column = to.column + v * kLanes;
    if (column >= to.slab_cols) break;  // a tile may stick out of a narrow slab: those sums are 0
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) add_lanes(to.rows + i * to.slab_cols, to, column, to.signs[i], acc[i][v]);
  }
}

// packed[tile][t][kTileCols] = a[t] with the column signs, zero beyond the last column.
template <class T>
void pack_a(const SketchLinearArgs& args, int64_t begin, int64_t end, int64_t n_tokens, int64_t t0, float* packed) {
  const int64_t cols = args.plan.cols, tiles = tiles_of(cols);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t c0 = tile * kTileCols;
    const int64_t n = min64(cols - c0, kTileCols);
    for (int64_t t = begin; t < end; ++t) {
      const T* in = row_of<T>(args.a, t) + c0;
      float* out = packed + (tile * n_tokens + (t - t0)) * kTileCols;
      if (args.plan.col_sign) {
        for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]) * args.plan.col_sign[c0 + j];
      } else {
        for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
      }
      for (int64_t j = n; j < kTileCols; ++j) out[j] = 0.0f;
    }
  }
}

// strip[t][kUnit] = kUnit columns of D from column c0, zero where there is none: c0 may be negative, too.
template <class T>
Tokens pack_d(const SketchLinearArgs& args, int64_t t0, int64_t n, int64_t c0, float* strip) {
  const int64_t begin = max64(-c0, 0), end = min64(args.d.cols - c0, kUnit);
  for (int64_t t = 0; t < n; ++t) {
    const T* in = row_of<T>(args.d, t0 + t) + c0;
    float* out = strip + t * kUnit;
    if (end - begin == kUnit) {
      for (int i = 0; i < kUnit; ++i) out[i] = to_float(in[i]);
    } else {
      for (int64_t i = 0; i < kUnit; ++i) out[i] = i >= begin && i < end ? to_float(in[i]) : 0.0f;
    }
  }
  return {strip, kUnit};
}

template <class T>
Tokens columns_of_d(const SketchLinearArgs& args, int64_t t0, int64_t n, int64_t c0, float* strip) {
  if constexpr (std::is_same_v<T, float>) {
    if (c0 >= 0 && c0 + kUnit <= args.d.cols) return {row_of<float>(args.d, t0) + c0, args.d.row_stride};
  }
  return pack_d<T>(args, t0, n, c0, strip);
}

// A, by tiles of kTileCols: tile i of token t is at data + i * tile_step + t * step.
struct ATiles {
  Tokens tokens;
  int64_t tile_step;
  Tokens tile(int64_t i, int64_t t) const { return tokens.from(i * tile_step + t * tokens.step); }
};

// One unit of 16 slab rows, all block pairs of D's rows [first_row, ..) that reach it, tokens [t0, t0 + n) of one range;
// a_t0 is t0 in `a`.
template <class T>
void accumulate_unit(const SketchLinearArgs& args, int64_t first_row, int64_t unit, int64_t slab, int64_t t0, int64_t n,
                     const ATiles& a, int64_t a_t0, float* strip, float* out) {
  const SlabPlan& plan = args.plan;
  const int64_t end_row = first_row + args.d.cols;
  const int64_t first_block = first_row / plan.slab_rows, last_block = (end_row - 1) / plan.slab_rows;
  const int64_t tiles_per_block = tiles_of(min64(plan.slab_cols, plan.cols));
  for (int64_t col_block = 0; col_block < plan.n_col_blocks; ++col_block) {
    const int64_t first_tile = col_block * tiles_per_block;
    const int64_t tiles = min64(tiles_of(plan.cols) - first_tile, tiles_per_block);
    for (int64_t row_block = first_block; row_block <= last_block; ++row_block) {
      const int64_t pair = row_block * plan.n_col_blocks + col_block;
      if (plan.pair_slab[pair] != slab) continue;
      const int64_t row_xor = plan.pair_row[pair], col_xor = plan.pair_col[pair];
      const int64_t r0 = row_block * plan.slab_rows + ((unit * kUnit) ^ (row_xor & ~(kUnit - 1)));
      if (r0 >= end_row || r0 + kUnit <= first_row) continue;
      Tokens d = columns_of_d<T>(args, t0, n, r0 - first_row, strip);
      for (int64_t half = 0; half < kUnit; half += 8) {
        if (r0 + half >= end_row || r0 + half + 8 <= first_row) continue;
        float* rows = out + (unit * kUnit + (half ^ (row_xor & 8))) * plan.slab_cols;
        float signs[8];
        for (int64_t i = 0, r = r0 + half; i < 8; ++i, ++r)  // outside of D's rows the sums are 0
          signs[i] = plan.pair_sign[pair] * (plan.row_sign && r < plan.rows ? plan.row_sign[r] : 1.0f);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const Tokens at = a.tile(first_tile + tile, a_t0);
          for (int i0 = 0; i0 < 8; i0 += kTileRows) {
            const Flush to{rows + i0 * plan.slab_cols, signs + i0, plan.slab_cols, tile * kTileCols, col_xor};
            if (d.data != strip) {
              multiply_tile<true>(n, d, at, to, strip);
              d = {strip, kUnit};
            } else {
              multiply_tile<false>(n, d.from(half + i0), at, to, strip);
            }
          }
        }
      }
    }
  }
}

// First token after t where a flush falls: every kTokens tokens, counted from the range's own first token, so
// that neighbours in the batch cannot change a segment's sums.
int64_t chunk_end(const SketchLinearArgs& args, int64_t range, int64_t t) {
  const int64_t begin = args.offsets[range];
  return min64(begin + ((t - begin) / kTokens + 1) * kTokens, args.offsets[range + 1]);
}

// All units of all ranges, tokens [t0, t1), which hold whole chunks; a's first token is t0. A task adds the groups of its
// segment in their order.
template <class T>
void accumulate(const SketchLinearArgs& args, int64_t t0, int64_t t1, const ATiles& a) {
  const int64_t units = args.plan.slab_rows / kUnit, segments = args.n_segments;
  int64_t first_range = 0, last_range = args.n_groups * segments;
  while (args.offsets[first_range + 1] <= t0) ++first_range;
  while (args.offsets[last_range - 1] >= t1) --last_range;
  const int64_t first_group = first_range / segments, last_group = (last_range - 1) / segments;
  const bool one_group = first_group == last_group;
  const int64_t first_segment = one_group ? first_range % segments : 0;
  const int64_t n_segments = one_group ? last_range - first_range : segments;
  run_tasks(n_segments * args.n_slabs * units, args.n_threads, [&](int64_t task) {
    const int64_t s = first_segment + task / (args.n_slabs * units);
    const int64_t slab = task / units % args.n_slabs, unit = task % units;
    alignas(64) float strip[kTokens * kUnit];
    float* out = args.out + s * args.out_stride + slab * args.plan.slab_rows * args.plan.slab_cols;
    for (int64_t group = first_group; group <= last_group; ++group) {
      const int64_t range = group * segments + s, first_row = args.first_row + group * args.row_step;
      const int64_t begin = max64(args.offsets[range], t0);
      const int64_t end = min64(args.offsets[range + 1], t1);
      for (int64_t t = begin, stop; t < end; t = stop) {
        stop = chunk_end(args, range, t);
        accumulate_unit<T>(args, first_row, unit, slab, t, stop - t, a, t - t0, strip, out);
      }
    }
  });
}

template <class TD, class TA>
void run(const SketchLinearArgs& args) {
  const SlabPlan& plan = args.plan;
  const int64_t tiles = tiles_of(plan.cols);
  const int64_t first = args.offsets[0], last = args.offsets[args.n_groups * args.n_segments];
  if constexpr (std::is_same_v<TA, float>) {
    if (!plan.col_sign && plan.cols % kTileCols == 0) {  // folded inputs: small, whole tiles, signs already in
      const float* a = row_of<float>(args.a, first);
      accumulate<TD>(args, first, last, {{a, args.a.row_stride}, kTileCols});
      return;
    }
  }
  // Tokens per phase: the packed copy of A stays near 8 MiB whatever the batch. A phase is made of whole chunks.
  const int64_t budget = max64(kTokens, (int64_t(8) << 20) / (tiles * kTileCols * 4));
  Scratch packed(tiles * kTileCols * min64(last - first, budget));
  int64_t range = 0;
  for (int64_t t0 = first, t1 = first; t0 < last; t0 = t1) {
    while (t1 < last) {
      while (args.offsets[range + 1] <= t1) ++range;
      const int64_t end = chunk_end(args, range, t1);
      if (end - t0 > budget) break;
      t1 = end;
    }
    const int64_t n_packed = t1 - t0;
    run_tasks(ceil_div(n_packed, 64), args.n_threads, [&](int64_t task) {
      const int64_t begin = t0 + task * 64, end = min64(begin + 64, t1);
      pack_a<TA>(args, begin, end, n_packed, t0, packed.data());
    });
    accumulate<TD>(args, t0, t1, {{packed.data(), kTileCols}, n_packed * kTileCols});
  }
}

}  // namespace

void sketch_linear(const SketchLinearArgs& args) {
  if (args.offsets[args.n_groups * args.n_segments] == args.offsets[0]) return;
  with_dtype(args.d.dtype, [&](auto* d) {
    with_dtype(args.a.dtype,
               [&](auto* a) { run<std::remove_pointer_t<decltype(d)>, std::remove_pointer_t<decltype(a)>>(args); });
  });
}

}  // namespace cropi::CROPI_ISA
