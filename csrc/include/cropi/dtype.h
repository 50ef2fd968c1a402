// Element types that cross the boundary from Python; the numbers are part of the binding's contract.
#pragma once
#include <cstdint>

namespace cropi {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A row-major matrix whose rows may be strided; columns are contiguous.
struct MatrixView {
  const void* data;
  int64_t rows, cols, row_stride;  // in elements
  DType dtype;
};

}  // namespace cropi
