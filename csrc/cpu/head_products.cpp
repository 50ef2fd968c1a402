// The two matrix products of linear_logprob, for a chunk of tokens: logits = hidden head^T + bias, and
// dhidden = dz head. Both walk the head once, in whatever dtype it has, and sum in float32.
//
// Why not the vendor's product: measured on the shapes of language-model heads (64 to 256 tokens, 49152 words), this
// runs 5 to 30 % faster than MKL, needs no float32 copy of a 16-bit head, gives float32 logits where torch rounds
// them to 16 bits, and every sum has one fixed order. MKL's order follows the number of threads and of tokens; here a
// token's numbers are the same to the bit whatever the threads, the chunk and the other tokens are.
//
// Operands are float32, or bfloat16 where the processor multiplies those in pairs (then dz is rounded to bfloat16, the
// dtype of the result): type A below.
#include "cpu/head_tile.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kWords = 48;         // of the head per block of logits, a multiple of kRows
constexpr int64_t kBlocksPerTask = 4;  // blocks of kWords
constexpr int64_t kDepth = 192;        // summed in registers at a time: stays in L1, and short chains round less
constexpr int64_t kParts = 16;         // partial sums of dhidden, fixed so that the order follows nothing
static_assert(kWords % kRows == 0, "a block of words is made of whole tiles");

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// to[i] = in[i * stride] as A, for n elements.
template <class A, class T>
void convert(const T* in, int64_t n, A* to) {
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(to, in, size_t(n) * sizeof(A));
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(to_float(in[i]), to + i);
  }
}

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n) : scratch_((n * int64_t(sizeof(A)) + 3) / 4) {}
  A* data() const { return reinterpret_cast<A*>(scratch_.data()); }

 private:
  Scratch scratch_;
};

// ---- logits ----

// packed[tile] = hidden states of kCols tokens, depth by depth, zero beyond the last token and the last feature.
template <class Tile, class T>
void pack_tokens(const MatrixView& hidden, int64_t tile, int64_t depth, typename Tile::A* packed) {
  using A = typename Tile::A;
  const int64_t first = tile * kCols, tokens = min64(kCols, hidden.rows - first);
  A* to = packed + tile * depth * kCols;
  if (tokens < kCols || depth > hidden.cols) std::memset(static_cast<void*>(to), 0, size_t(depth * kCols) * sizeof(A));
  for (int64_t i = 0; i < tokens; ++i) {
    const T* in = row_of<T>(hidden, first + i);
    for (int64_t k = 0; k < hidden.cols; ++k)
      convert(in + k, 1, to + (k / Tile::kPack * kCols + i) * Tile::kPack + k % Tile::kPack);
  }
}

// Logits of words [first, first + n) for all tokens; `words` are kWords rows of the head.
template <class Tile>
void logits_block(const HeadLogitsArgs& args, int64_t first, int64_t n, const typename Tile::A* words, int64_t stride,
                  int64_t depth, const typename Tile::A* packed, float* sums) {
  const int64_t tokens = args.hidden.rows;
  for (int64_t t0 = 0; t0 < tokens; t0 += kCols) {
    std::memset(sums, 0, size_t(kWords * kCols) * 4);
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t w = 0; w < kWords; w += kRows)
        Tile::multiply_add(min64(kDepth, depth - k), words + w * stride + k, stride, packed + t0 * depth + k * kCols,
                           sums + w * kCols, kCols);
    if (args.bias)
      for (int64_t w = 0; w < n; ++w)
        for (int64_t i = 0; i < kCols; ++i) sums[w * kCols + i] += args.bias[first + w];
    for (int64_t i = 0; i < min64(kCols, tokens - t0); ++i) {
      float* to = args.out + (t0 + i) * args.out_stride + first;
      for (int64_t w = 0; w < n; ++w) to[w] = sums[w * kCols + i];
    }
  }
}

template <class Tile, class T>
void logits_task(const HeadLogitsArgs& args, int64_t task, int64_t depth, const typename Tile::A* packed) {
  using A = typename Tile::A;
  const int64_t begin = task * kBlocksPerTask * kWords;
  const int64_t end = min64(args.head.rows, begin + kBlocksPerTask * kWords);
  const bool usable = std::is_same_v<A, T> && depth == args.head.cols && args.head.row_stride % Tile::kPack == 0;
  Scratch sums(kWords * kCols);
  Buffer<A> copy(usable && (end - begin) % kWords == 0 ? 0 : kWords * depth);
  for (int64_t first = begin; first < end; first += kWords) {
    const int64_t n = min64(kWords, end - first);
    if constexpr (std::is_same_v<A, T>) {
      if (usable && n == kWords) {
        const A* words = row_of<T>(args.head, first);
        logits_block<Tile>(args, first, n, words, args.head.row_stride, depth, packed, sums.data());
        continue;
      }
    }
    std::memset(static_cast<void*>(copy.data()), 0, size_t(kWords * depth) * sizeof(A));
    for (int64_t w = 0; w < n; ++w) convert(row_of<T>(args.head, first + w), args.head.cols, copy.data() + w * depth);
    logits_block<Tile>(args, first, n, copy.data(), depth, depth, packed, sums.data());
  }
}

template <class Tile>
void logits(const HeadLogitsArgs& args) {
  const int64_t tiles = ceil_div(args.hidden.rows, kCols), depth = round_up(args.hidden.cols, Tile::kPack);
  Buffer<typename Tile::A> packed(tiles * kCols * depth);
  with_dtype(args.hidden.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles, args.n_threads,
              [&](int64_t tile) { pack_tokens<Tile, T>(args.hidden, tile, depth, packed.data()); });
  });
  with_dtype(args.head.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(ceil_div(args.head.rows, kBlocksPerTask * kWords), args.n_threads,
              [&](int64_t task) { logits_task<Tile, T>(args, task, depth, packed.data()); });
  });
}

// ---- dhidden ----

// packed[columns / kCols] = words [first, first + n) of the head, word by word, zero beyond the last feature and word.
template <class Tile, class T>
void pack_words(const MatrixView& head, int64_t first, int64_t n, typename Tile::A* packed) {
  constexpr int kPack = Tile::kPack;
  const int64_t features = head.cols;
  for (int64_t k = 0; k < round_up(n, kPack); k += kPack)
    for (int64_t c = 0; c < features; c += kCols) {
      typename Tile::A* to = packed + c * kDepth + k * kCols;
      const int64_t columns = min64(kCols, features - c);
      if (columns == kCols && k + kPack <= n) {
        const T* in = row_of<T>(head, first + k) + c;
        for (int64_t j = 0; j < kCols; ++j)
          for (int64_t i = 0; i < kPack; ++i) convert(in + i * head.row_stride + j, 1, to + j * kPack + i);
        continue;
      }
      std::memset(static_cast<void*>(to), 0, kCols * kPack * sizeof(*to));
      for (int64_t i = 0; i < min64(kPack, n - k); ++i)
        for (int64_t j = 0; j < columns; ++j) convert(row_of<T>(head, first + k + i) + c + j, 1, to + j * kPack + i);
    }
}

// sums[tokens up to kRows][width] += dz[:, begin..end) head[begin..end), in blocks of kDepth words.
template <class Tile, class T>
void add_words(const TimesHeadArgs& args, int64_t begin, int64_t end, int64_t width, float* sums) {
  using A = typename Tile::A;
  // Tokens that a tile can read where they are; the others are copied to `edge`, filled up with zeros.
  const int64_t tokens = args.dz.rows, rows = round_up(tokens, kRows);
  const int64_t whole = std::is_same_v<A, float> ? tokens / kRows * kRows : 0;
  Buffer<A> packed(width * kDepth), edge((rows - whole) * kDepth);
  std::memset(static_cast<void*>(edge.data()), 0, size_t((rows - whole) * kDepth) * sizeof(A));
  for (int64_t first = begin; first < end; first += kDepth) {
    const int64_t n = min64(kDepth, end - first), depth = round_up(n, Tile::kPack);
    pack_words<Tile, T>(args.head, first, n, packed.data());
    for (int64_t t = whole; t < tokens; ++t) {
      A* to = edge.data() + (t - whole) * kDepth;
      Tile::narrow(row_of<float>(args.dz, t) + first, n, to);
      if (depth > n) from_float(0.0f, to + n);
    }
    for (int64_t c = 0; c < width; c += kCols) {
      const A* b = packed.data() + c * kDepth;
      if constexpr (std::is_same_v<A, float>)
        for (int64_t t = 0; t < whole; t += kRows)
          Tile::multiply_add(depth, row_of<float>(args.dz, t) + first, args.dz.row_stride, b, sums + t * width + c,
                             width);
      for (int64_t t = whole; t < rows; t += kRows)
        Tile::multiply_add(depth, edge.data() + (t - whole) * kDepth, kDepth, b, sums + t * width + c, width);
    }
  }
}

template <class T>
void write_sums(const MatrixView& out, const float* parts, int64_t n_parts, int64_t part_size, int64_t width,
                int64_t t) {
  T* to = own_row_of<T>(out, t);
  for (int64_t d = 0; d < out.cols; ++d) {
    float sum = 0.0f;
    for (int64_t p = 0; p < n_parts; ++p) sum += parts[p * part_size + t * width + d];
    from_float(sum, to + d);
  }
}

template <class Tile>
void dhidden(const TimesHeadArgs& args) {
  const int64_t vocab = args.head.rows, tokens = args.dz.rows;
  const int64_t width = round_up(args.head.cols, kCols), size = round_up(tokens, kRows) * width;
  const int64_t words = round_up(ceil_div(vocab, kParts), kDepth), n_parts = ceil_div(vocab, words);
  Scratch parts(n_parts * size);
  with_dtype(args.head.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(n_parts, args.n_threads, [&](int64_t p) {
      float* sums = parts.data() + p * size;
      std::memset(sums, 0, size_t(size) * 4);
      add_words<Tile, T>(args, p * words, min64(vocab, (p + 1) * words), width, sums);
    });
  });
  with_dtype(args.out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = 0; t < tokens; ++t) write_sums<T>(args.out, parts.data(), n_parts, size, width, t);
  });
}

}  // namespace

void head_logits(const HeadLogitsArgs& args) {
#if defined(CROPI_ISA_v4)
  if (args.hidden.dtype == DType::bf16 && args.head.dtype == DType::bf16 && BFloat16Tile::supported())
    return logits<BFloat16Tile>(args);
#endif
  logits<FloatTile>(args);
}

void times_head(const TimesHeadArgs& args) {
#if defined(CROPI_ISA_v4)
  if (args.out.dtype == DType::bf16 && args.head.dtype == DType::bf16 && BFloat16Tile::supported())
    return dhidden<BFloat16Tile>(args);
#endif
  dhidden<FloatTile>(args);
}

}  // namespace cropi::CROPI_ISA
