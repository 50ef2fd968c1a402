// Products of many stored rows with a few directions, and the rows' squared lengths, in one pass over the stored bytes.
//
// A row's sums are taken in one order, whatever rows lie beside it: equal rows have equal products. Within a chunk of 512
// entries they are float32, over the chunks float64.
#include "cpu/kernels.h"
#include "cpu/project.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kChunk = 512;  // entries; a chunk of every direction stays in the cache for a group of rows
constexpr int64_t kMany = 64;    // directions from which on a task has more rows
#if defined(CROPI_ISA_v4)
constexpr int kTile = 8;  // rows at once: two accumulators each in 32 registers
#else
constexpr int kTile = 4;
#endif
constexpr int64_t kStep = 2 * kLanes;
constexpr int kLocality = 2;  // of what is fetched ahead: it goes to the second level cache

template <class T>
void widen(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_as_float(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

// Entries first .. first + n of a row as float32, not yet scaled; packed kinds start at a whole byte.
void decode(RowKind kind, const uint8_t* row, int64_t first, int64_t n, float* out) {
  switch (kind) {
    case RowKind::f32: widen(reinterpret_cast<const float*>(row) + first, n, out); return;
    case RowKind::bf16: widen(reinterpret_cast<const BFloat16*>(row) + first, n, out); return;
    case RowKind::f16: widen(reinterpret_cast<const Float16*>(row) + first, n, out); return;
    case RowKind::i8: {
      const int8_t* in = reinterpret_cast<const int8_t*>(row) + first;
      for (int64_t i = 0; i < n; ++i) out[i] = float(in[i]);
      return;
    }
    case RowKind::i4: {
      const uint8_t* in = row + first / 2;
      for (int64_t i = 0; i < n / 2; ++i) {
        out[2 * i] = float(int(in[i] & 15) - 8);
        out[2 * i + 1] = float(int(in[i] >> 4) - 8);
      }
      return;
    }
    case RowKind::i1: {
      const uint8_t* in = row + first / 8;
      for (int64_t i = 0; i < n / 8; ++i)
        for (int k = 0; k < 8; ++k) out[8 * i + k] = float(int((in[i] >> k) & 1) * 2 - 1);
      return;
    }
  }
}

// Asks for entries first .. first + n of a row, which are decoded after the products of the rows before. Rows lie far
// apart and a chunk is short, so that no prefetcher of the processor follows.
void fetch(RowKind kind, const uint8_t* row, int64_t first, int64_t n) {
  constexpr int64_t kBits[] = {32, 16, 16, 8, 4, 1};  // of an entry, by kind
  const int64_t bits = kBits[int(kind)], end = (first + n) * bits / 8;
  for (int64_t i = first * bits / 8; i < end; i += 64) __builtin_prefetch(row + i, 0, kLocality);
}

// Entry i belongs to scale i / block.
void scale_entries(const float* scale, int64_t block, int64_t first, int64_t n, float* x) {
  for (int64_t i = 0; i < n;) {
    const float s = scale[(first + i) / block];
    const int64_t rest = block - (first + i) % block, end = min64(i + rest, n);
    for (; i < end; ++i) x[i] *= s;
  }
}

// The sum of the lanes, by halves. Through memory it would wait for its own store: half of the time of 8 directions.
typedef float Vec4 __attribute__((vector_size(16)));

double sum_lanes(Vec4 v) { return double((v[0] + v[2]) + (v[1] + v[3])); }
#if defined(CROPI_ISA_v3) || defined(CROPI_ISA_v4)
double sum_lanes(Vec8 v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#endif
#if defined(CROPI_ISA_v4)
double sum_lanes(Vec v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// sums[r * stride] += <x[r], d>, n a multiple of kStep.
void add_products(const float* x, const float* d, int64_t n, double* sums, int64_t stride) {
  Vec acc[kTile][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) acc[r][0] = acc[r][1] = Vec{};
  for (int64_t i = 0; i < n; i += kStep) {
    const Vec d0 = load(d + i), d1 = load(d + i + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      acc[r][0] += load(x + r * kChunk + i) * d0;
      acc[r][1] += load(x + r * kChunk + i + kLanes) * d1;
    }
  }
  for (int r = 0; r < kTile; ++r) sums[r * stride] += sum_lanes(acc[r][0] + acc[r][1]);
}

void add_squares(const float* x, int64_t n, double* sums, int64_t stride) {
  for (int r = 0; r < kTile; ++r) {
    Vec a = Vec{}, b = Vec{};
    for (int64_t i = 0; i < n; i += kStep) {
      const Vec x0 = load(x + r * kChunk + i), x1 = load(x + r * kChunk + i + kLanes);
      a += x0 * x0;
      b += x1 * x1;
    }
    sums[r * stride] += sum_lanes(a + b);
  }
}

}  // namespace

void row_products(const RowProductsArgs& args) {
  // A task copies every direction: a fifth of its time at 256 directions and 32 rows. With few directions 128 rows take
  // longer, as each lies on a page of its own. No row's sums depend on the rows beside it, so that threads may.
  const bool large = args.n_directions >= kMany && args.n_rows >= 128 * int64_t(args.n_threads);
  const int64_t task_rows = large ? 128 : 32;
  const int64_t width = args.n_directions + 1, n_groups = ceil_div(args.n_rows, task_rows);
  run_tasks(n_groups, args.n_threads, [&](int64_t g) {
    const int64_t begin = g * task_rows, rows = min64(args.n_rows - begin, task_rows);
    Scratch directions((args.n_directions + 1) * kChunk), tile(kTile * kChunk), held(2 * task_rows * width);
    double* sums = reinterpret_cast<double*>(held.data());
    for (int64_t i = 0; i < task_rows * width; ++i) sums[i] = 0.0;
    for (int64_t first = 0; first < args.dim; first += kChunk) {
      const int64_t n = min64(args.dim - first, kChunk), padded = ceil_div(n, kStep) * kStep;
      for (int64_t v = 0; v < args.n_directions; ++v) {
        float* d = directions.data() + v * kChunk;
        std::memcpy(d, args.directions + v * args.dim + first, size_t(n) * 4);
        for (int64_t i = n; i < padded; ++i) d[i] = 0.0f;
      }
      for (int64_t t = 0; t < rows; t += kTile) {
        const bool last = t + kTile >= rows;
        const int64_t next = last ? 0 : t + kTile, from = last ? first + n : first;
        const int64_t ahead = min64(kChunk, args.dim - from);
        for (int64_t r = 0; r < kTile; ++r) {  // rows beyond the last: zeros, so that every row takes the same way
          float* x = tile.data() + r * kChunk;
          const int64_t count = t + r < rows ? n : 0;
          if (count) {
            decode(args.kind, static_cast<const uint8_t*>(args.rows) + (begin + t + r) * args.row_bytes, first, n, x);
            if (args.scale)
              scale_entries(args.scale + (begin + t + r) * args.n_blocks, args.dim / args.n_blocks, first, n, x);
          }
          for (int64_t i = count; i < padded; ++i) x[i] = 0.0f;
          if (next + r < rows)
            fetch(args.kind, static_cast<const uint8_t*>(args.rows) + (begin + next + r) * args.row_bytes, from, ahead);
        }
        for (int64_t v = 0; v < args.n_directions; ++v)
          add_products(tile.data(), directions.data() + v * kChunk, padded, sums + t * width + v, width);
        add_squares(tile.data(), padded, sums + t * width + args.n_directions, width);
      }
    }
    std::memcpy(args.out + begin * width, sums, size_t(rows * width) * 8);
  });
}

}  // namespace cropi::CROPI_ISA
