// The slab sketch of D^T A per segment: a matrix product whose tiles are flushed, with a sign and an XOR of their
// address, into the few thousand numbers of the sketch. No [rows, cols] buffer exists.
//
// Work is split by the rows of the slab, so a task owns what it writes: the result is the same for any thread
// count. XORs are multiples of 8, so an aligned unit of 16 slab rows is fed by an aligned unit of 16 rows of each
// block, and a packed strip of D is one pass over whole cache lines.
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

int64_t tiles_of(int64_t cols) { return (cols + kTileCols - 1) / kTileCols; }

// d: [n][8] packed rows; a: [n][kTileCols]; sums: [kTileRows][kTileCols].
void multiply_tile(int64_t n, const float* d, const float* a, float* sums) {
  constexpr int kVecs = kTileCols / kLanes;
  Vec acc[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
  for (int64_t t = 0; t < n; ++t, d += 8, a += kTileCols) {
    Vec b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = load(a + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec x = d[i] - Vec{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + i * kTileCols + v * kLanes, acc[i][v]);
}

// packed[tile][t][kTileCols] = a[t] with the column signs, zero beyond the last column.
template <class T>
void pack_a(const SketchLinearArgs& args, int64_t begin, int64_t end, int64_t n_tokens, int64_t t0, float* packed) {
  const int64_t cols = args.plan.cols, tiles = tiles_of(cols);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t c0 = tile * kTileCols;
    const int64_t n = cols - c0 < kTileCols ? cols - c0 : kTileCols;
    for (int64_t t = begin; t < end; ++t) {
      const T* in = static_cast<const T*>(args.a.data) + t * args.a.row_stride + c0;
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

// strip[half][t][8] = 16 rows of D from row r0, with the row signs, zero beyond the last row.
template <class T>
void pack_d(const SketchLinearArgs& args, int64_t t0, int64_t n, int64_t r0, float* strip) {
  float sign[kUnit];
  const int64_t rows = args.plan.rows - r0 < kUnit ? args.plan.rows - r0 : kUnit;
  for (int64_t i = 0; i < kUnit; ++i)
    sign[i] = i >= rows ? 0.0f : args.plan.row_sign ? args.plan.row_sign[r0 + i] : 1.0f;
  for (int64_t t = 0; t < n; ++t) {
    const T* in = static_cast<const T*>(args.d.data) + (t0 + t) * args.d.row_stride + r0;
    float* low = strip + t * 8;
    float* high = low + kTokens * 8;
    if (rows == kUnit) {
      for (int i = 0; i < 8; ++i) low[i] = to_float(in[i]) * sign[i];
      for (int i = 0; i < 8; ++i) high[i] = to_float(in[8 + i]) * sign[8 + i];
    } else {
      for (int64_t i = 0; i < 8; ++i) low[i] = i < rows ? to_float(in[i]) * sign[i] : 0.0f;
      for (int64_t i = 8; i < kUnit; ++i) high[i - 8] = i < rows ? to_float(in[i]) * sign[i] : 0.0f;
    }
  }
}

// One unit of 16 slab rows, all block pairs that reach it, tokens [t0, t0 + n) of one segment.
template <class T>
void accumulate_unit(const SketchLinearArgs& args, int64_t unit, int64_t slab, int64_t t0, int64_t n,
                     int64_t packed_offset, int64_t n_packed, const float* packed, float* strip, float* out) {
  const SlabPlan& plan = args.plan;
  const int64_t tiles_per_block = tiles_of(plan.slab_cols < plan.cols ? plan.slab_cols : plan.cols);
  float sums[kTileRows * kTileCols];
  for (int64_t col_block = 0; col_block < plan.n_col_blocks; ++col_block) {
    const int64_t first_tile = col_block * tiles_per_block;
    const int64_t tiles_left = tiles_of(plan.cols) - first_tile;
    const int64_t tiles = tiles_left < tiles_per_block ? tiles_left : tiles_per_block;
    for (int64_t row_block = 0; row_block < plan.n_row_blocks; ++row_block) {
      const int64_t pair = row_block * plan.n_col_blocks + col_block;
      if (plan.pair_slab[pair] != slab) continue;
      const int64_t row_xor = plan.pair_row[pair], col_xor = plan.pair_col[pair];
      const int64_t r0 = row_block * plan.slab_rows + ((unit * kUnit) ^ (row_xor & ~(kUnit - 1)));
      if (r0 >= plan.rows) continue;
      const float pair_sign = plan.pair_sign[pair];
      pack_d<T>(args, t0, n, r0, strip);
      for (int64_t half = 0; half < 2; ++half) {
        if (r0 + 8 * half >= plan.rows) continue;
        const float* d = strip + half * kTokens * 8;
        float* row = out + (unit * kUnit + ((8 * half) ^ (row_xor & 8))) * plan.slab_cols;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const float* a = packed + ((first_tile + tile) * n_packed + packed_offset) * kTileCols;
          for (int i0 = 0; i0 < 8; i0 += kTileRows) {
            multiply_tile(n, d + i0, a, sums);
            for (int i = 0; i < kTileRows; ++i) {
              for (int g = 0; g < kTileCols; g += 8) {  // a tile may stick out of a narrow slab: those sums are 0
                const int64_t column = tile * kTileCols + g;
                if (column >= plan.slab_cols) break;
                float* dst = row + (i0 + i) * plan.slab_cols + (column ^ col_xor);
                store8(dst, load8(dst) + pair_sign * load8(sums + i * kTileCols + g));
              }
            }
          }
        }
      }
    }
  }
}

// First token after t where a flush falls: every kTokens tokens, counted from the segment's own first token, so
// that neighbours in the batch cannot change a segment's sums.
int64_t chunk_end(const SketchLinearArgs& args, int64_t segment, int64_t t) {
  const int64_t begin = args.offsets[segment], end = args.offsets[segment + 1];
  const int64_t next = begin + ((t - begin) / kTokens + 1) * kTokens;
  return next < end ? next : end;
}

template <class TD, class TA>
void run(const SketchLinearArgs& args) {
  const SlabPlan& plan = args.plan;
  const int64_t tiles = tiles_of(plan.cols), units = plan.slab_rows / kUnit;
  // Tokens per phase: the packed copy of A stays near 8 MiB whatever the batch. A phase is made of whole chunks.
  const int64_t fit = (int64_t(8) << 20) / (tiles * kTileCols * 4);
  const int64_t budget = fit < kTokens ? kTokens : fit;
  const int64_t first = args.offsets[0], last = args.offsets[args.n_segments];
  Scratch packed(tiles * kTileCols * (last - first < budget ? last - first : budget));
  int64_t segment = 0;
  for (int64_t t0 = first, t1 = first; t0 < last; t0 = t1) {
    const int64_t first_segment = segment;
    while (t1 < last) {
      while (args.offsets[segment + 1] <= t1) ++segment;
      const int64_t end = chunk_end(args, segment, t1);
      if (end - t0 > budget) break;
      t1 = end;
    }
    const int64_t n_segments = segment + 1 - first_segment, n_packed = t1 - t0;
    run_tasks((n_packed + 63) / 64, args.n_threads, [&](int64_t task) {
      const int64_t begin = t0 + task * 64, end = begin + 64 < t1 ? begin + 64 : t1;
      pack_a<TA>(args, begin, end, n_packed, t0, packed.data());
    });
    run_tasks(n_segments * args.n_slabs * units, args.n_threads, [&](int64_t task) {
      const int64_t s = first_segment + task / (args.n_slabs * units);
      const int64_t slab = task / units % args.n_slabs, unit = task % units;
      const int64_t begin = args.offsets[s] > t0 ? args.offsets[s] : t0;
      const int64_t end = args.offsets[s + 1] < t1 ? args.offsets[s + 1] : t1;
      alignas(64) float strip[2 * kTokens * 8];
      float* out = args.out + s * args.out_stride + slab * plan.slab_rows * plan.slab_cols;
      for (int64_t t = begin, stop; t < end; t = stop) {
        stop = chunk_end(args, s, t);
        accumulate_unit<TD>(args, unit, slab, t, stop - t, t - t0, n_packed, packed.data(), strip, out);
      }
    });
  }
}

}  // namespace

void sketch_linear(const SketchLinearArgs& args) {
  if (args.offsets[args.n_segments] == args.offsets[0]) return;
  with_dtype(args.d.dtype, [&](auto* d) {
    with_dtype(args.a.dtype,
               [&](auto* a) { run<std::remove_pointer_t<decltype(d)>, std::remove_pointer_t<decltype(a)>>(args); });
  });
}

}  // namespace cropi::CROPI_ISA
