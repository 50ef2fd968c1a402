// How a sparse projection is cut: from the sizes alone, so that bits depend neither on the GPU nor on the other rows.
//
// A block of threads keeps kSlots sums in registers. They are the buckets of one *slice*, once for every tile of a
// *stage*: Z consecutive tiles where the buckets of all nonzeros fit Z times, or one tile. Where they do not fit, a
// slice is some of the nonzeros, or a piece of the buckets of one. A block adds the stages of its *part* one after the
// other; the parts are added in a fixed order by a second kernel.
#pragma once
#include "cropi/project.h"
#include "cuda/threads.h"

namespace cropi::gpu {

constexpr int kThreads = 256;
constexpr int kSlots = 1 << 14;           // 64 registers of every thread
constexpr int kMaxUnits = 256;            // tiles times nonzeros of a stage
constexpr int64_t kBlocksPerRow = 528;    // four times the 132 multiprocessors of an H100
constexpr int64_t kStagesPerPart = 16;    // at least: writing and adding a part costs as much as reading two stages
constexpr int64_t kWorkspace = 64 << 20;  // bytes of partial sums, or those of one row
constexpr int64_t kMaxGridYZ = 65535;

// What a call is about. Both tensors lie on the device.
struct ProjectCall {
  const void* x;  // [rows, n], rows x_stride apart; the adjoint writes it
  int64_t rows, n, x_stride;
  uint64_t offset;  // coordinate of the first column
  Key key;
  int64_t dim;
  int32_t nnz, keep, dtype, gaussian;
  float scale;
  float* y;  // [rows, dim], rows y_stride apart
  int64_t y_stride;
};

struct SparseShape {
  uint32_t width, group, nnz;  // buckets of a nonzero; gcd(width, 16); nonzeros
  uint32_t nonzeros;           // of a slice
  uint32_t span;               // buckets of a nonzero in a slice: the width, or a piece of it
  uint32_t pieces;             // slices of one nonzero
  uint32_t tiles;              // of a stage
  uint32_t draws;              // of 128 signs, per nonzero of a stage that is not cut into pieces
  int64_t slices, first_stage, stages, parts;

  SparseShape() = default;
  explicit SparseShape(const ProjectCall& call) {
    nnz = uint32_t(call.nnz);
    width = uint32_t(call.dim / call.nnz);
    group = width & (0u - width) & 31u;
    if (group == 0 || group > 16) group = 16;
    nonzeros = uint32_t(max64(1, min64(nnz, kSlots / int64_t(width))));
    pieces = uint32_t(divide_up(width, kSlots));
    span = pieces == 1 ? width : uint32_t(divide_up(divide_up(width, pieces), 16) * 16);
    const bool all = nonzeros == nnz && pieces == 1;
    tiles = !all ? 1 : uint32_t(max64(1, min64(kSlots / (int64_t(width) * nnz), kMaxUnits / nnz)));
    draws = uint32_t((int64_t(tiles) * span + 126) / 128 + 1);  // wherever the stage begins
    slices = divide_up(nnz, nonzeros) * pieces;
    const uint64_t stage = uint64_t(width) * tiles;
    first_stage = int64_t(call.offset / stage);
    stages = call.n == 0 ? 0 : int64_t((call.offset + uint64_t(call.n) - 1) / stage) - first_stage + 1;
    parts = max64(1, min64(max64(1, kBlocksPerRow / slices), stages / kStagesPerPart));
  }
};

}  // namespace cropi::gpu
