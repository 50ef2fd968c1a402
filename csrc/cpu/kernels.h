// The kernels' arguments and one declaration per instruction-set level. Pointers are checked by the caller.
#pragma once
#include <cstdint>

#include "cropi/dtype.h"
#include "cropi/philox.h"

namespace cropi {

// out[t, (c % width) ^ offset[c / width]] += sign[c] * in[t, c], summed in float32 in the order of the blocks.
struct FoldArgs {
  MatrixView in;
  void* out;  // [rows, width], same dtype as in, contiguous
  int64_t width;
  const uint32_t* offset;  // [ceil(cols / width)], multiples of 8 below width
  const float* sign;       // [cols]
  int n_threads;
};

// Where the blocks of a matrix land in the sketch: block (I, J) of slab_rows x slab_cols entries is added to slab
// pair_slab[I, J] with pair_sign, its rows XORed with pair_row and its columns with pair_col (docs/sketch.md).
struct SlabPlan {
  int64_t rows, cols;            // of the (folded) matrix
  int64_t slab_rows, slab_cols;  // powers of two
  int64_t n_row_blocks, n_col_blocks;
  const float* row_sign;  // [rows] or null
  const float* col_sign;  // [cols] or null
  const uint32_t* pair_row;
  const uint32_t* pair_col;
  const uint32_t* pair_slab;
  const float* pair_sign;  // all [n_row_blocks, n_col_blocks]
};

// out[s] += sketch of sum over tokens t of segment s of d[t]^T a[t].
//
// Grouped: tokens are sorted by (group, segment), range q = g * n_segments + s holds those of group g in segment s, and
// column i of d is row first_row + g * row_step + i of the matrix: an expert's rows in the stack of all experts, or the
// rows that a rank holds. n_groups = 1 and first_row = 0 is a plain linear layer.
struct SketchLinearArgs {
  MatrixView d, a;
  SlabPlan plan;
  int64_t n_segments;
  const int64_t* offsets;  // [n_groups * n_segments + 1], token ranges
  float* out;
  int64_t out_stride;
  int64_t n_slabs;
  int n_threads;
  int64_t n_groups = 1, first_row = 0, row_step = 0;
};

// out[s] += sketch of sum over tokens t of segment s of onehot(row[t])^T x[t].
struct SketchEmbeddingArgs {
  MatrixView x;
  const int64_t* row;     // [tokens], already folded
  const float* row_sign;  // [tokens], of the row; that of the plan is not read
  SlabPlan plan;
  int64_t n_segments;
  const int64_t* offsets;
  float* out;
  int64_t out_stride;
  int n_threads;
};

// Gradients of a norm's scale and bias per segment: weight[s] = sum dy * xhat, bias[s] = sum dy.
struct NormGradArgs {
  MatrixView x, dy;  // [tokens, n]; x may be null when only the bias is wanted
  bool centered;     // LayerNorm (subtract the mean) or RMSNorm
  float eps;
  int64_t n_segments;
  const int64_t* offsets;
  float* weight;  // [n_segments, n] or null
  float* bias;    // [n_segments, n] or null
  int n_threads;
};

// y[t] = weight * x[t] * scale[t], scale[t] = 1 / sqrt(mean(x[t]^2) + eps). Rounded once; x, weight and y have one dtype.
struct RmsNormArgs {
  MatrixView x;  // [tokens, n]
  const void* weight;
  float eps;
  void* y;       // [tokens, n], contiguous
  float* scale;  // [tokens]
  int n_threads;
};

// dx[t] = scale[t] * (weight * dy[t] - xhat[t] * mean(weight * dy[t] * xhat[t])), xhat[t] = x[t] * scale[t], and
// sums[s] = sum over tokens t of segment s of dy[t] * xhat[t]. Only tokens that lie in a segment are written.
struct RmsNormBackwardArgs {
  MatrixView dy, x;  // one dtype, which is that of weight and dx too
  const void* weight;
  const float* scale;  // [tokens], of the forward
  void* dx;            // [tokens, n], contiguous
  int64_t n_segments;
  const int64_t* offsets;
  float* sums;  // [n_segments, n] or null
  int n_threads;
};

// out = silu(gate) * up, silu(z) = z / (1 + exp(-z)). Rounded once; one dtype.
struct SwigluArgs {
  MatrixView gate, up;
  void* out;  // [tokens, n], contiguous
  int n_threads;
};

// The gradients of gate and up, from that of the product.
struct SwigluBackwardArgs {
  MatrixView dh, gate, up;  // one dtype
  void *dgate, *dup;        // [tokens, n], contiguous
  int n_threads;
};

// out[s, start + (i ^ xor)] += sign * gradient[s, i], in the order of i; of `block` numbers each, counted from 0, start
// and xor are an entry of `blocks`. Each xor is a multiple of 8 below `block`, which is a power of two.
struct SketchVectorArgs {
  const float* gradient;
  int64_t n_segments, size, gradient_stride;
  const int64_t* blocks;
  int64_t block;
  const int8_t* sign;
  float* out;
  int64_t out_stride;
};

// out[t, v] = sum_k hidden[t, k] head[v, k] + bias[v], in float32.
struct HeadLogitsArgs {
  MatrixView hidden, head;
  const float* bias;  // [vocab] or null
  float* out;         // [tokens, vocab], rows out_stride apart
  int64_t out_stride;
  int n_threads;
};

// out[t, k] = sum_v dz[t, v] head[v, k], summed in float32 and rounded once to the dtype of out. With a bfloat16 head and
// out, dz may be rounded to bfloat16 first.
struct TimesHeadArgs {
  MatrixView dz, head;  // dz is float32
  MatrixView out;       // overwritten
  int n_threads;
};

// One pass over logits [rows, vocab] that gives, per row, with x = softcap(z) / temperature:
// log_sum = log sum_v exp(x_v - max x), logprob = (x_target - max x) - log_sum, and the entropy of softmax(x).
// lse = top / temperature + log_sum: kept apart, because their sum drops bits when the logits share an offset.
struct LogprobRowsArgs {
  MatrixView logits;
  const int64_t* target;           // [rows]; negative: no target, logprob 0
  float temperature, softcap;      // softcap 0: none
  float *logprob, *top, *log_sum;  // [rows]; top: the largest soft-capped logit, not yet divided
  float* entropy;                  // [rows] or null
  int n_threads;
};

// In place: logits -> grad * (onehot(target) - softmax) * d softcap(z) / dz / temperature. Rows with grad 0 or
// without a target become zero.
struct LogprobBackwardArgs {
  MatrixView logits;  // overwritten
  const int64_t* target;
  const float* grad;                     // [rows]
  const float *logprob, *top, *log_sum;  // of the forward
  float temperature, softcap;
  int n_threads;
};

// project: y[b] += scale * S x[b]; its adjoint overwrites x[b] = scale * S^T y[b] (docs/project.md).
struct ProjectArgs {
  MatrixView x;     // [rows, n]; the adjoint writes it, float32
  uint64_t offset;  // coordinate of the first column
  Key key;
  int64_t dim, nnz;  // nnz: nonzeros of a coordinate, a divisor of dim (sparse)
  uint32_t keep;     // 65536ths of the coordinates that are kept
  bool gaussian;     // dense: normal entries, not signs
  float scale;
  float* y;  // [rows, dim]
  int64_t y_stride;
  int n_threads;
};

// project, sparse kinds, of CSR rows: y[b] = scale * S x[b], NaN throughout where a number is not finite. With `count`
// the result is sparse too: count[b] entries of row b, one row after the other. Without `start` the rows are dense
// float64, and y[b] += scale * S x[b].
struct ProjectCsrArgs {
  const void* value;   // float32, or float64
  const void* column;  // int32, or int64, each below `cols`
  const void* start;   // [rows + 1], of the same type
  bool wide_value, wide_index;
  int64_t rows, cols, n_values, row_stride;
  uint64_t offset;
  Key key;
  int64_t dim, nnz;
  uint32_t keep;
  double scale;
  void* y;          // of the values' type: [rows, dim], or [n_values * nnz]
  int32_t* bucket;  // [n_values * nnz], of a sparse result: null where there are no values
  int64_t* count;   // [rows], or null for a dense result
  int n_threads;
};

// How the entries of a row are stored (the numbers are part of the binding's contract). i4 and i1 are packed, the first
// entry in the lowest bits: i4 holds q + 8, i1 a set bit for 1 and a clear one for -1.
enum class RowKind : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4, i1 = 5 };

// out[b, v] = <x[b], directions[v]>, out[b, n_directions] = <x[b], x[b]> with x[b, i] = rows[b, i] scale[b, i / block].
struct RowProductsArgs {
  const void* rows;
  RowKind kind;
  int64_t n_rows, dim, row_bytes;
  const float* scale;  // [n_rows, n_blocks] or null
  int64_t n_blocks;
  const float* directions;  // [n_directions, dim]
  int64_t n_directions;
  double* out;  // [n_rows, n_directions + 1]
  int n_threads;
};

#define CROPI_KERNELS(X)                        \
  X(fold_columns, FoldArgs)                     \
  X(sketch_linear, SketchLinearArgs)            \
  X(sketch_embedding, SketchEmbeddingArgs)      \
  X(norm_grad, NormGradArgs)                    \
  X(rms_norm, RmsNormArgs)                      \
  X(rms_norm_backward, RmsNormBackwardArgs)     \
  X(swiglu, SwigluArgs)                         \
  X(swiglu_backward, SwigluBackwardArgs)        \
  X(sketch_vector, SketchVectorArgs)            \
  X(head_logits, HeadLogitsArgs)                \
  X(times_head, TimesHeadArgs)                  \
  X(logprob_rows, LogprobRowsArgs)              \
  X(logprob_rows_backward, LogprobBackwardArgs) \
  X(project_sparse, ProjectArgs)                \
  X(project_sparse_adjoint, ProjectArgs)        \
  X(project_csr, ProjectCsrArgs)                \
  X(project_dense, ProjectArgs)                 \
  X(project_dense_adjoint, ProjectArgs)         \
  X(row_products, RowProductsArgs)

#define CROPI_DECLARE_KERNEL(name, Args) void name(const Args&);
namespace v1 {
CROPI_KERNELS(CROPI_DECLARE_KERNEL)
}
namespace v3 {
CROPI_KERNELS(CROPI_DECLARE_KERNEL)
}
namespace v4 {
CROPI_KERNELS(CROPI_DECLARE_KERNEL)
}
#undef CROPI_DECLARE_KERNEL

#define CROPI_POINTER(name, Args) void (*name)(const Args&);
struct Kernels {
  CROPI_KERNELS(CROPI_POINTER)
};
#undef CROPI_POINTER

// Instruction-set levels: 1 baseline (SSE2 or NEON), 3 AVX2 + FMA + F16C, 4 AVX-512.
int detected_level();
int current_level();
void set_level(int level);  // lowered to what the machine has and the build holds
const Kernels& kernels();

}  // namespace cropi
