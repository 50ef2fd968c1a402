// Dense Rademacher and Gaussian projections: entries are drawn into shared memory or registers and used at once.
// Bound by drawing and multiplying (rows * n * dim products), not by memory; no tensor cores, so that sums are float32.
#pragma once
#include <cmath>

#include "cuda/elements.h"
#include "cuda/project_shape.h"

namespace cropi::gpu {

constexpr int kDenseThreads = 128;  // one per column of a block of the matrix, or per coordinate of the adjoint
constexpr int kDenseRows = 8;
constexpr int64_t kDenseBlocks = 2048, kDenseStepsPerPart = 64;

struct DenseShape {
  int64_t column_blocks, steps, parts;  // blocks of 128 columns, steps of 32 coordinates counted from coordinate 0
  uint64_t first_step;

  DenseShape() = default;
  explicit DenseShape(const ProjectCall& call) {
    column_blocks = divide_up(call.dim, 128);
    first_step = call.offset / 32;
    steps = call.n == 0 ? 0 : int64_t((call.offset + uint64_t(call.n) - 1) / 32 - first_step) + 1;
    parts = max64(1, min64(kDenseBlocks / column_blocks, steps / kDenseStepsPerPart));
  }
};

CROPI_HD float signed_one(uint32_t word, uint32_t bit) {
  return float_of(0x3f800000u | (word << (31 - bit) & 0x80000000u));
}

// d.w[i] without an address: an index that is not known would put the draw into local memory.
CROPI_HD uint32_t pick(const Draw& d, int i) { return i == 0 ? d.w[0] : i == 1 ? d.w[1] : i == 2 ? d.w[2] : d.w[3]; }

// The four normals of a Gaussian draw (Box and Muller): columns c, c + 32, c + 64, c + 96 of a block.
CROPI_HD void normals(const Draw& d, float* out) {
  CROPI_UNROLL
  for (int half = 0; half < 4; half += 2) {
    const float radius = std::sqrt(-2.0f * std::log(float((d.w[half] >> 8) + 1) * 5.9604644775390625e-8f));
    const float turn = float(int32_t(d.w[half + 1])) * 4.656612873077393e-10f;  // half turns, in [-1, 1]
#if defined(__CUDA_ARCH__)
    float sine, cosine;
    sincospif(turn, &sine, &cosine);
#else
    const float sine = float(std::sin(3.14159265358979323846 * turn)),
                cosine = float(std::cos(3.14159265358979323846 * turn));
#endif
    out[half] = radius * cosine;
    out[half + 1] = radius * sine;
  }
}

// partial[row, part, c] = sum over the part's coordinates of x[row, p] entry(p, c). Block (columns, part, 8 rows).
template <class T, bool kGaussian>
struct ProjectDense {
  static constexpr int kBlockThreads = kDenseThreads, kBlocksPerMultiprocessor = 4, kStep = 32;
  struct Shared {
    float x[kStep][kDenseRows];
    uint32_t keep;
    union {
      uint32_t sign[kStep][4];
      float normal[kGaussian ? kStep : 1][kDenseThreads];
    };
  };
  struct State {
    float sum[kDenseRows];
  };

  ProjectCall call;
  DenseShape shape;
  float* partial;

  CROPI_HD void operator()(Block block, Shared& shared) const {
    Threads<kDenseThreads, State> threads;
    threads.each([&](int, State& state) {
      CROPI_UNROLL
      for (int r = 0; r < kDenseRows; ++r) state.sum[r] = 0.0f;
    });
    const int64_t begin = shape.steps * block.y / shape.parts, end = shape.steps * (block.y + 1) / shape.parts;
    for (int64_t s = begin; s < end; ++s) {
      threads.each([&](int thread, State&) { fill((shape.first_step + uint64_t(s)) * 32, block, thread, shared); });
      threads.sync();
      threads.each([&](int thread, State& state) { multiply(thread, shared, state); });
      threads.sync();
    }
    threads.each([&](int thread, State& state) {
      const int64_t column = block.x * kDenseThreads + thread, row = block.z * kDenseRows;
      CROPI_UNROLL
      for (int r = 0; r < kDenseRows; ++r)
        if (row + r < call.rows && column < call.dim)
          partial[((row + r) * shape.parts + block.y) * call.dim + column] = state.sum[r];
    });
  }

 private:
  CROPI_HD void fill(uint64_t first, Block block, int thread, Shared& shared) const {
    for (int i = thread; i < kStep * kDenseRows; i += kDenseThreads) {
      const int64_t row = block.z * kDenseRows + i / kStep, column = int64_t(first - call.offset) + i % kStep;
      const bool inside = row < call.rows && column >= 0 && column < call.n;
      shared.x[i % kStep][i / kStep] =
          inside ? widen(load_one(static_cast<const T*>(call.x) + row * call.x_stride + column)) : 0.0f;
    }
    if (thread == 0)
      shared.keep = call.keep == int32_t(kKeepAll)
                        ? 0xffffffffu
                        : pick(draw_keep_mask(call.key, first / 128, uint32_t(call.keep)), int(first % 128 / 32));
    if constexpr (kGaussian) {
      for (int i = thread; i < kStep * 32; i += kDenseThreads) {
        float four[4];
        normals(project_draw(call.key, first + uint64_t(i / 32), kProjectGaussian, uint32_t(block.x * 32 + i % 32)),
                four);
        CROPI_UNROLL
        for (int m = 0; m < 4; ++m) shared.normal[i / 32][32 * m + i % 32] = four[m];
      }
    } else {
      const Draw d = project_draw(call.key, first + uint64_t(thread / 4), kProjectRademacher, uint32_t(block.x));
      shared.sign[thread / 4][thread % 4] = pick(d, thread % 4);  // one thread alone would keep the others waiting
    }
  }

  CROPI_HD void multiply(int thread, const Shared& shared, State& state) const {
    for (int i = 0; i < kStep; ++i) {
      if (!(shared.keep >> i & 1)) continue;
      float entry;
      if constexpr (kGaussian)
        entry = shared.normal[i][thread];
      else
        entry = signed_one(shared.sign[i][thread / 32], uint32_t(thread % 32));
      CROPI_UNROLL
      for (int r = 0; r < kDenseRows; ++r) state.sum[r] = std::fma(shared.x[i][r], entry, state.sum[r]);
    }
  }
};

// x[row, p] = scale * sum over c of y[row, c] entry(p, c), a thread per coordinate. Block (128 coordinates, 8 rows).
template <bool kGaussian>
struct ProjectDenseAdjoint {
  static constexpr int kBlockThreads = kDenseThreads, kBlocksPerMultiprocessor = 4;
  struct Shared {
    float y[kDenseThreads][kDenseRows];
    Draw keep;
  };
  struct State {
    float sum[kDenseRows];
  };

  ProjectCall call;
  DenseShape shape;

  CROPI_HD void operator()(Block block, Shared& shared) const {
    const uint64_t draw = call.offset / 128 + uint64_t(block.x);
    Threads<kDenseThreads, State> threads;
    threads.each([&](int thread, State& state) {
      CROPI_UNROLL
      for (int r = 0; r < kDenseRows; ++r) state.sum[r] = 0.0f;
      if (thread == 0 && call.keep < int32_t(kKeepAll))
        shared.keep = draw_keep_mask(call.key, draw, uint32_t(call.keep));
    });
    for (int64_t columns = 0; columns < shape.column_blocks; ++columns) {
      threads.each([&](int thread, State&) {
        const int64_t column = columns * kDenseThreads + thread;
        for (int r = 0; r < kDenseRows; ++r) {
          const int64_t row = block.y * kDenseRows + r;
          const bool inside = row < call.rows && column < call.dim;
          shared.y[thread][r] = inside ? call.y[row * call.y_stride + column] : 0.0f;
        }
      });
      threads.sync();
      threads.each([&](int thread, State& state) { multiply(draw * 128 + uint64_t(thread), columns, shared, state); });
      threads.sync();
    }
    threads.each([&](int thread, State& state) {
      const int64_t column = int64_t(draw * 128 - call.offset) + thread;
      if (column < 0 || column >= call.n) return;
      const bool kept = call.keep == int32_t(kKeepAll) || (shared.keep.w[thread / 32] >> (thread % 32) & 1);
      CROPI_UNROLL
      for (int r = 0; r < kDenseRows; ++r) {
        const int64_t row = block.y * kDenseRows + r;
        float* x = static_cast<float*>(const_cast<void*>(call.x)) + row * call.x_stride;
        if (row < call.rows) x[column] = kept ? call.scale * state.sum[r] : 0.0f;
      }
    });
  }

 private:
  CROPI_HD void multiply(uint64_t p, int64_t columns, const Shared& shared, State& state) const {
    if constexpr (kGaussian) {
      for (int c = 0; c < 32; ++c) {
        float four[4];
        normals(project_draw(call.key, p, kProjectGaussian, uint32_t(columns * 32 + c)), four);
        CROPI_UNROLL
        for (int m = 0; m < 4; ++m) add(shared.y[32 * m + c], four[m], state);
      }
    } else {
      const Draw d = project_draw(call.key, p, kProjectRademacher, uint32_t(columns));
      CROPI_UNROLL
      for (int m = 0; m < 4; ++m)
        for (uint32_t c = 0; c < 32; ++c) add(shared.y[32 * m + int(c)], signed_one(d.w[m], c), state);
    }
  }

  CROPI_HD static void add(const float* y, float entry, State& state) {
    CROPI_UNROLL
    for (int r = 0; r < kDenseRows; ++r) state.sum[r] = std::fma(y[r], entry, state.sum[r]);
  }
};

}  // namespace cropi::gpu
