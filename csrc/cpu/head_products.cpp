// The two matrix products of linear_logprob, for a chunk of tokens: logits = hidden head^T + bias, and
// dhidden = dz head. Both walk the head once, in whatever dtype it has, and sum in float32.
//
// Why not the vendor's product: measured on the shapes of language-model heads (64 to 256 tokens, 49152 words), this
// runs 5 to 20 % faster than MKL on one core, needs no float32 copy of a 16-bit head, and every sum has one fixed
// order. MKL's order follows the number of threads and of tokens; here a token's numbers are the same to the bit
// whatever the threads, the chunk and the other tokens are.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

// A register tile is kRows x kCols sums: 24 accumulators where there are 32 vector registers, 12 where there are 16.
#if defined(CROPI_ISA_v4) || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kVecs = 2, kCols = kVecs * kLanes;
constexpr int64_t kWords = 48;         // of the head per block of logits, a multiple of kRows
constexpr int64_t kBlocksPerTask = 4;  // blocks of kWords
constexpr int64_t kMaxFeatures = 192;  // summed in registers at a time: short chains of additions round less
constexpr int64_t kDepth = 192;        // words summed in registers: the packed strip of the head stays in L1
constexpr int64_t kParts = 16;         // partial sums of dhidden, fixed so that the order follows nothing
static_assert(kWords % kRows == 0, "a block of words is made of whole tiles");

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[i][j] += sum_k a[i][k] b[k][j] for kRows x kCols; b is packed, a is read by broadcasts and needs no packing.
void multiply_add(int64_t depth, const float* a, int64_t a_stride, const float* b, float* out, int64_t out_stride) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) column[j] = load(b + k * kCols + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec x = a[i * a_stride + k] - Vec{};
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * column[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      float* to = out + i * out_stride + j * kLanes;
      store(to, load(to) + acc[i][j]);
    }
}

template <class T>
const T* row_of(const MatrixView& m, int64_t r) {
  return static_cast<const T*>(m.data) + r * m.row_stride;
}

// ---- logits ----

// packed[tile][k][kCols] = hidden states of kCols tokens, zero beyond the last one.
template <class T>
void pack_tokens(const MatrixView& hidden, int64_t tile, float* packed) {
  const int64_t features = hidden.cols, first = tile * kCols;
  float* to = packed + tile * features * kCols;
  for (int64_t i = 0; i < kCols; ++i) {
    if (first + i >= hidden.rows) {
      for (int64_t k = 0; k < features; ++k) to[k * kCols + i] = 0.0f;
      continue;
    }
    const T* in = row_of<T>(hidden, first + i);
    for (int64_t k = 0; k < features; ++k) to[k * kCols + i] = to_float(in[k]);
  }
}

// Logits of words [first, first + n) for all tokens. `words` are their float32 rows, kWords of them.
void logits_block(const HeadLogitsArgs& args, int64_t first, int64_t n, const float* words, int64_t stride,
                  const float* packed, float* sums) {
  const int64_t features = args.hidden.cols, tokens = args.hidden.rows;
  const int64_t depth = ceil_div(features, ceil_div(features, kMaxFeatures));
  for (int64_t t0 = 0; t0 < tokens; t0 += kCols) {
    std::memset(sums, 0, size_t(kWords * kCols) * 4);
    for (int64_t k = 0; k < features; k += depth)
      for (int64_t w = 0; w < kWords; w += kRows)
        multiply_add(smaller(depth, features - k), words + w * stride + k, stride, packed + (t0 * features) + k * kCols,
                     sums + w * kCols, kCols);
    if (args.bias)
      for (int64_t w = 0; w < n; ++w)
        for (int64_t i = 0; i < kCols; ++i) sums[w * kCols + i] += args.bias[first + w];
    for (int64_t i = 0; i < smaller(kCols, tokens - t0); ++i) {
      float* to = args.out + (t0 + i) * args.out_stride + first;
      for (int64_t w = 0; w < n; ++w) to[w] = sums[w * kCols + i];
    }
  }
}

template <class T>
void logits_task(const HeadLogitsArgs& args, int64_t task, const float* packed) {
  const int64_t features = args.hidden.cols, vocab = args.head.rows;
  const int64_t begin = task * kBlocksPerTask * kWords, end = smaller(vocab, begin + kBlocksPerTask * kWords);
  Scratch sums(kWords * kCols);
  Scratch copy(std::is_same_v<T, float> && end - begin == kBlocksPerTask * kWords ? 0 : kWords * features);
  for (int64_t first = begin; first < end; first += kWords) {
    const int64_t n = smaller(kWords, end - first);
    if constexpr (std::is_same_v<T, float>) {
      if (n == kWords) {
        logits_block(args, first, n, row_of<T>(args.head, first), args.head.row_stride, packed, sums.data());
        continue;
      }
    }
    std::memset(copy.data(), 0, size_t(kWords * features) * 4);
    for (int64_t w = 0; w < n; ++w) {
      const T* in = row_of<T>(args.head, first + w);
      for (int64_t k = 0; k < features; ++k) copy.data()[w * features + k] = to_float(in[k]);
    }
    logits_block(args, first, n, copy.data(), features, packed, sums.data());
  }
}

// ---- dhidden ----

// packed[tile][k][kCols] = words [first, first + n) of the head, zero beyond the last feature.
template <class T>
void pack_words(const MatrixView& head, int64_t first, int64_t n, float* packed) {
  const int64_t features = head.cols;
  for (int64_t k = 0; k < n; ++k) {
    const T* in = row_of<T>(head, first + k);
    for (int64_t c = 0; c < features; c += kCols) {
      float* to = packed + c * kDepth + k * kCols;
      if (c + kCols <= features) {
        for (int64_t j = 0; j < kCols; ++j) to[j] = to_float(in[c + j]);
      } else {
        for (int64_t j = 0; j < kCols; ++j) to[j] = c + j < features ? to_float(in[c + j]) : 0.0f;
      }
    }
  }
}

// sums[rows up to kRows][width] += dz[:, begin..end) head[begin..end), in blocks of kDepth words.
template <class T>
void add_words(const TimesHeadArgs& args, int64_t begin, int64_t end, int64_t width, float* sums) {
  const int64_t tokens = args.dz.rows;
  Scratch packed(width * kDepth), edge(kRows * kDepth);
  for (int64_t first = begin; first < end; first += kDepth) {
    const int64_t n = smaller(kDepth, end - first);
    pack_words<T>(args.head, first, n, packed.data());
    const int64_t whole = tokens / kRows * kRows;
    if (whole < tokens) {  // the last tokens, filled up with zeros
      std::memset(edge.data(), 0, size_t(kRows * kDepth) * 4);
      for (int64_t t = whole; t < tokens; ++t)
        std::memcpy(edge.data() + (t - whole) * kDepth, row_of<float>(args.dz, t) + first, size_t(n) * 4);
    }
    for (int64_t c = 0; c < width; c += kCols) {
      const float* b = packed.data() + c * kDepth;
      for (int64_t t = 0; t < whole; t += kRows)
        multiply_add(n, row_of<float>(args.dz, t) + first, args.dz.row_stride, b, sums + t * width + c, width);
      if (whole < tokens) multiply_add(n, edge.data(), kDepth, b, sums + whole * width + c, width);
    }
  }
}

template <class T>
void write_sums(const MatrixView& out, const float* parts, int64_t n_parts, int64_t part_size, int64_t width,
                int64_t t) {
  T* to = static_cast<T*>(const_cast<void*>(out.data)) + t * out.row_stride;
  for (int64_t d = 0; d < out.cols; ++d) {
    float sum = 0.0f;
    for (int64_t p = 0; p < n_parts; ++p) sum += parts[p * part_size + t * width + d];
    from_float(sum, to + d);
  }
}

}  // namespace

void head_logits(const HeadLogitsArgs& args) {
  const int64_t tiles = ceil_div(args.hidden.rows, kCols);
  Scratch packed(tiles * kCols * args.hidden.cols);
  with_dtype(args.hidden.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles, args.n_threads, [&](int64_t tile) { pack_tokens<T>(args.hidden, tile, packed.data()); });
  });
  with_dtype(args.head.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(ceil_div(args.head.rows, kBlocksPerTask * kWords), args.n_threads,
              [&](int64_t task) { logits_task<T>(args, task, packed.data()); });
  });
}

void times_head(const TimesHeadArgs& args) {
  const int64_t vocab = args.head.rows, tokens = args.dz.rows;
  const int64_t width = ceil_div(args.head.cols, kCols) * kCols, rows = ceil_div(tokens, kRows) * kRows;
  const int64_t words = ceil_div(ceil_div(vocab, kParts), kDepth) * kDepth, n_parts = ceil_div(vocab, words);
  Scratch parts(n_parts * rows * width);
  with_dtype(args.head.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(n_parts, args.n_threads, [&](int64_t p) {
      float* sums = parts.data() + p * rows * width;
      std::memset(sums, 0, size_t(rows * width) * 4);
      add_words<T>(args, p * words, smaller(vocab, (p + 1) * words), width, sums);
    });
  });
  with_dtype(args.out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = 0; t < tokens; ++t) write_sums<T>(args.out, parts.data(), n_parts, rows * width, width, t);
  });
}

}  // namespace cropi::CROPI_ISA
