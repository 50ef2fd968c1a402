// The adjoint of a sparse projection: every coordinate reads its buckets, from the first or second level cache.
#pragma once
#include "cuda/elements.h"
#include "cuda/project_shape.h"

namespace cropi::gpu {

// x[row, p] = scale * sum over nonzeros of sign * y[row, bucket], in the order of the nonzeros; 0 where p is dropped.
//
// kCount 4: a thread takes four coordinates at a time, which are four neighbouring buckets up to the lower bits of the
// XOR: 16-byte loads, and 16-byte stores where kAligned. kCount 1: one by one, for tiles without groups of four, `y` at
// any address and more nonzeros than the table holds.
template <int kCount, bool kAligned>
struct ProjectSparseAdjoint {
  static constexpr int kBlockThreads = kThreads, kBlocksPerMultiprocessor = 6;
  static constexpr int kEach = 8, kSpan = kThreads * kEach * kCount;  // runs of a thread; coordinates of a block
  static constexpr int kDraws = kSpan / 128, kMaxNonzeros = 64 / (kCount * kCount), kMaxPlaces = 512;
  static constexpr int64_t kRows = 8;  // share the draws

  struct Shared {
    uint32_t sign[kMaxNonzeros * kDraws * 4], keep[kDraws * 4];
    uint32_t place[kMaxPlaces];  // shift + low of tile t for nonzero j, at j * tiles + t
  };

  ProjectCall call;
  SparseShape shape;

  // Block (kSpan coordinates, 8 rows).
  CROPI_HD void operator()(Block block, Shared& shared) const {
    const uint64_t start = call.offset / 128 * 128 + uint64_t(block.x) * kSpan, first_tile = start / shape.width;
    const uint32_t phase = uint32_t(start - first_tile * shape.width);  // below the width
    const uint32_t tiles = (phase + kSpan - 1) / shape.width + 1;
    const bool tabled = tiles * shape.nnz <= uint32_t(kMaxPlaces);  // narrow tiles are drawn by every thread
    Threads<kThreads, Nothing> threads;
    threads.each([&](int thread, Nothing&) {
      for (int i = thread; i < int(shape.nnz) * kDraws; i += kThreads) {
        const Draw d = project_draw(call.key, start / 128 + uint64_t(i % kDraws), kProjectSign, uint32_t(i / kDraws));
        for (int w = 0; w < 4; ++w) shared.sign[4 * i + w] = d.w[w];
      }
      if (call.keep < int32_t(kKeepAll) && thread < kDraws) draw_keep(start / 128 + uint64_t(thread), thread, shared);
      if (tabled) {
        const int mirrored = kThreads - 1 - thread;  // so that the draws fall to threads without signs
        for (uint32_t i = uint32_t(mirrored); i < tiles * shape.nnz; i += kThreads)
          shared.place[i] = place_of(first_tile + i % tiles, i / tiles);
      }
    });
    threads.sync();
    threads.each([&](int thread, Nothing&) {
      const int64_t last = min64(call.rows, (block.y + 1) * kRows);
      for (int e = 0; e < kEach; ++e) {
        const uint32_t at = uint32_t(e * kThreads + thread) * kCount;
        const int64_t column = int64_t(start + at - call.offset);
        if (column + kCount <= 0 || column >= call.n) continue;
        const bool all = call.keep == int32_t(kKeepAll);
        const uint32_t kept = all ? (1u << kCount) - 1 : bits_at(shared.keep, at);
        const uint32_t tile = (phase + at) / shape.width, i = (phase + at) % shape.width;
        for (int64_t row = block.y * kRows; row < last; ++row) {
          const float* y = call.y + row * call.y_stride;
          float sum[kCount] = {};
          for (uint32_t j = 0; kept && j < shape.nnz; ++j) {
            const uint32_t place = tabled ? shared.place[j * tiles + tile] : place_of(first_tile + tile, j);
            const uint32_t shift = place & ~(shape.group - 1), low = place & (shape.group - 1);
            const uint32_t turned = i + shift < shape.width ? i + shift : i + shift - shape.width;
            Run<float, kCount> run;
            run.load(y + int64_t(j) * shape.width + (turned ^ (low & ~uint32_t(kCount - 1))));
            run.permute(low & uint32_t(kCount - 1));
            run.flip(bits_at(shared.sign, j * kSpan + at));
            CROPI_UNROLL
            for (int w = 0; w < kCount; ++w) {
              const float value = float_of(run.word[w]);
              sum[w] = j == 0 ? value : sum[w] + value;
            }
          }
          Run<float, kCount> out;
          CROPI_UNROLL
          for (int w = 0; w < kCount; ++w) out.word[w] = kept >> w & 1 ? bits_of(call.scale * sum[w]) : 0;
          float* x = static_cast<float*>(const_cast<void*>(call.x)) + row * call.x_stride + column;
          if constexpr (kAligned)
            if (column >= 0 && column + kCount <= call.n) {
              out.store(x);
              continue;
            }
          CROPI_UNROLL
          for (int w = 0; w < kCount; ++w)
            if (column + w >= 0 && column + w < call.n) x[w] = float_of(out.word[w]);
        }
      }
    });
  }

 private:
  CROPI_HD static uint32_t bits_at(const uint32_t* words, uint32_t bit) {
    return words[bit / 32] >> (bit % 32) & ((1u << kCount) - 1);
  }

  CROPI_HD uint32_t place_of(uint64_t tile, uint32_t nonzero) const {
    const TilePlace place = draw_tile_place(call.key, tile, nonzero, shape.width, shape.group);
    return place.shift + place.low;
  }

  CROPI_HD void draw_keep(uint64_t block, int index, Shared& to) const {
    const Draw kept = draw_keep_mask(call.key, block, uint32_t(call.keep));
    for (int w = 0; w < 4; ++w) to.keep[4 * index + w] = kept.w[w];
  }
};

}  // namespace cropi::gpu
