// The launches of one call, the same on a GPU and in the emulation: `launch(x, y, z, kernel)` runs a grid of blocks.
#pragma once
#include "cuda/project_dense.h"
#include "cuda/project_sparse.h"
#include "cuda/project_sparse_adjoint.h"
#include "cuda/project_tiles.h"

namespace cropi::gpu {

struct PartPlan {
  int64_t parts, rows;  // of partial sums per row; rows that share the workspace
  explicit PartPlan(const ProjectCall& call, bool dense)
      : parts(dense                      ? DenseShape(call).parts
              : TilesShape::serves(call) ? TilesShape(call).parts
                                         : SparseShape(call).parts),
        rows(max64(1, min64(min64(call.rows, kMaxGridYZ), kWorkspace / (parts * call.dim * 4)))) {}
  int64_t bytes(const ProjectCall& call) const { return call.rows == 0 ? 0 : rows * parts * call.dim * 4; }
};

inline ProjectCall some_rows(ProjectCall call, int64_t first, int64_t count, int64_t bytes_per_element) {
  call.x = static_cast<const char*>(call.x) + first * call.x_stride * bytes_per_element;
  call.y += first * call.y_stride;
  call.rows = min64(count, call.rows - first);
  return call;
}

template <class Launch>
void add_parts(const Launch& launch, const ProjectCall& call, int64_t parts, const float* partial) {
  launch(divide_up(call.dim, AddParts::kColumns), call.rows, 1,
         AddParts{partial, call.y, parts, call.dim, call.y_stride, call.scale});
}

template <class T, int kCount, bool kKeep, class Launch>
void launch_sparse(const Launch& launch, const ProjectCall& call, float* partial) {
  const SparseShape shape(call);
  const uint32_t runs = shape.width / kCount;
  launch(shape.slices, shape.parts, call.rows,
         ProjectSparse<T, kCount, kKeep>{call, shape, uint32_t(((1ull << 31) + runs - 1) / runs), partial});
  add_parts(launch, call, shape.parts, partial);
}

// Whether every row lets a group of 16 coordinates begin at a multiple of 16 bytes.
template <class T>
bool aligned(const ProjectCall& call) {
  const uint64_t address = uint64_t(reinterpret_cast<uintptr_t>(call.x)) - call.offset * sizeof(T);
  return address % 16 == 0 && (call.rows == 1 || uint64_t(call.x_stride) * sizeof(T) % 16 == 0);
}

template <class T, bool kAligned, bool kKeep, class Launch>
void launch_tiles(const Launch& launch, const ProjectCall& call, float* partial) {
  const TilesShape shape(call);
  launch(int64_t(shape.pieces) * call.nnz, shape.parts, call.rows,
         ProjectTiles<T, kAligned, kKeep>{call, shape, partial});
  add_parts(launch, call, shape.parts, partial);
}

template <class T, class Launch>
void project_sparse(const Launch& launch, const ProjectCall& call, void* workspace) {
  constexpr int kWide = 16 / int(sizeof(T));
  const int64_t group = PartPlan(call, false).rows;
  const bool keep = call.keep < int32_t(kKeepAll), even = aligned<T>(call);
  const bool tiles = TilesShape::serves(call), wide = even && SparseShape(call).group == 16;
  float* partial = static_cast<float*>(workspace);
  for (int64_t row = 0; row < call.rows; row += group) {
    const ProjectCall some = some_rows(call, row, group, sizeof(T));
    if (tiles && even && keep) launch_tiles<T, true, true>(launch, some, partial);
    if (tiles && even && !keep) launch_tiles<T, true, false>(launch, some, partial);
    if (tiles && !even && keep) launch_tiles<T, false, true>(launch, some, partial);
    if (tiles && !even && !keep) launch_tiles<T, false, false>(launch, some, partial);
    if (tiles) continue;
    if (wide && keep) launch_sparse<T, kWide, true>(launch, some, partial);
    if (wide && !keep) launch_sparse<T, kWide, false>(launch, some, partial);
    if (!wide && keep) launch_sparse<T, 1, true>(launch, some, partial);
    if (!wide && !keep) launch_sparse<T, 1, false>(launch, some, partial);
  }
}

template <class T, class Launch>
void project_dense(const Launch& launch, const ProjectCall& call, void* workspace) {
  const DenseShape shape(call);
  const int64_t group = PartPlan(call, true).rows;
  float* partial = static_cast<float*>(workspace);
  for (int64_t row = 0; row < call.rows; row += group) {
    const ProjectCall some = some_rows(call, row, group, sizeof(T));
    const int64_t blocks = divide_up(some.rows, kDenseRows);
    if (some.gaussian)
      launch(shape.column_blocks, shape.parts, blocks, ProjectDense<T, true>{some, shape, partial});
    else
      launch(shape.column_blocks, shape.parts, blocks, ProjectDense<T, false>{some, shape, partial});
    add_parts(launch, some, shape.parts, partial);
  }
}

template <int kCount, bool kAligned, class Launch>
void launch_sparse_adjoint(const Launch& launch, const ProjectCall& call) {
  using Kernel = ProjectSparseAdjoint<kCount, kAligned>;
  const int64_t blocks = divide_up(int64_t(call.offset % 128) + call.n, Kernel::kSpan);
  for (int64_t row = 0; row < call.rows; row += kMaxGridYZ * Kernel::kRows) {
    const ProjectCall some = some_rows(call, row, kMaxGridYZ * Kernel::kRows, 4);
    launch(blocks, divide_up(some.rows, Kernel::kRows), 1, Kernel{some, SparseShape(some)});
  }
}

template <class Launch>
void project_sparse_adjoint(const Launch& launch, const ProjectCall& call) {
  const bool loads = reinterpret_cast<uintptr_t>(call.y) % 16 == 0 && (call.rows == 1 || call.y_stride % 4 == 0);
  if (SparseShape(call).group % 4 || call.nnz > ProjectSparseAdjoint<4, true>::kMaxNonzeros || !loads)
    launch_sparse_adjoint<1, false>(launch, call);
  else if (aligned<float>(call))
    launch_sparse_adjoint<4, true>(launch, call);
  else
    launch_sparse_adjoint<4, false>(launch, call);
}

template <class Launch>
void project_dense_adjoint(const Launch& launch, const ProjectCall& call) {
  const int64_t blocks = divide_up(int64_t(call.offset % 128) + call.n, kDenseThreads);
  for (int64_t row = 0; row < call.rows; row += kMaxGridYZ * kDenseRows) {
    const ProjectCall some = some_rows(call, row, kMaxGridYZ * kDenseRows, 4);
    const int64_t row_blocks = divide_up(some.rows, kDenseRows);
    if (some.gaussian)
      launch(blocks, row_blocks, 1, ProjectDenseAdjoint<true>{some, DenseShape(some)});
    else
      launch(blocks, row_blocks, 1, ProjectDenseAdjoint<false>{some, DenseShape(some)});
  }
}

template <class F>
void with_element(int dtype, F&& f) {
  if (dtype == int(DType::f32)) f(static_cast<float*>(nullptr));
  if (dtype == int(DType::bf16)) f(static_cast<Bf16*>(nullptr));
  if (dtype == int(DType::f16)) f(static_cast<F16*>(nullptr));
}

}  // namespace cropi::gpu
