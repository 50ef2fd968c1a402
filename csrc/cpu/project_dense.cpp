// Dense Rademacher and Gaussian projections: blocks of the matrix are drawn into L1 and multiplied at once.
//
// The matrix is never stored and a block is drawn once for up to 64 rows of the batch. Work is cut into blocks of
// columns and a number of parts of the coordinates that follows from the sizes alone; the parts are added in a fixed
// tree, so that bits depend neither on the thread count nor on the other rows.
#include "cpu/project.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kColumns = 128;     // of a block: one draw of 128 signs, or 32 draws of 4 normals
constexpr int64_t kCoordinates = 32;  // of a block; 16 KiB of matrix
constexpr int64_t kRows = 64;
constexpr int64_t kPartFloats = 1 << 17;  // partial sums of one row: 32 MiB for 64 rows

#if defined(CROPI_ISA_v4)
constexpr int kWide = 4;  // vectors of columns in a register tile of 4 rows
#else
constexpr int kWide = 2;
#endif

Vec square_root(Vec v) {
#if defined(CROPI_ISA_v4)
  return Vec(_mm512_maskz_sqrt_ps(0xffff, __m512(v)));
#elif defined(CROPI_ISA_v3)
  return Vec(_mm256_sqrt_ps(__m256(v)));
#elif defined(__SSE__)
  return Vec(_mm_sqrt_ps(__m128(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// -2 log((w + 1) / 2^24) for the top 24 bits w of a word: mantissa in [1/sqrt 2, sqrt 2), atanh series.
Vec minus_two_log(VecU32 word) {
  const Vec u = __builtin_convertvector(VecI32(word >> 8) + 1, Vec);  // 1 .. 2^24, exact
  const VecI32 bits = VecI32(u) - 0x3F3504F3;                         // bits of 1 / sqrt 2
  const Vec exponent = __builtin_convertvector((bits >> 23) - 24, Vec);
  const Vec m = Vec((bits & 0x007fffff) + 0x3F3504F3);
  const Vec z = (m - 1.0f) / (m + 1.0f), zz = z * z;  // |z| < 0.1716
  Vec series = zz * 0.1111111f + 0.14285715f;
  series = series * zz + 0.2f;
  series = series * zz + 0.33333334f;
  series = series * zz + 1.0f;
  return -2.0f * (exponent * 0.69314718f + 2.0f * z * series);
}

// cos and sin of 2 pi word / 2^32: the quadrant exactly, the rest by Taylor series on [-pi/4, pi/4].
void circle(VecU32 word, Vec* cosine, Vec* sine) {
  const VecU32 quadrant = (word + 0x20000000u) >> 30;
  const Vec angle = __builtin_convertvector(VecI32(word - (quadrant << 30)), Vec) * 1.4629180792671596e-9f;
  const Vec a2 = angle * angle;
  Vec s = a2 * 2.7557319e-6f - 1.9841270e-4f;
  s = s * a2 + 8.3333333e-3f;
  s = s * a2 - 0.16666667f;
  s = s * a2 * angle + angle;
  Vec c = a2 * 2.4801587e-5f - 1.3888889e-3f;
  c = c * a2 + 4.1666667e-2f;
  c = c * a2 - 0.5f;
  c = c * a2 + 1.0f;
  const VecI32 odd = VecI32(quadrant & 1u) != 0;
  const VecI32 flip_cos = VecI32(((quadrant + 1u) & 2u) << 30), flip_sin = VecI32((quadrant & 2u) << 30);
  *cosine = Vec(((VecI32(s) & odd) | (VecI32(c) & ~odd)) ^ flip_cos);
  *sine = Vec(((VecI32(c) & odd) | (VecI32(s) & ~odd)) ^ flip_sin);
}

// block[i][c] = entry (coordinate first + i, column 128 * column_block + c) of the matrix, i < 32.
void draw_signs(Key key, uint64_t first, uint32_t column_block, float* block) {
  for (int64_t i = 0; i < kCoordinates; i += kLanes) {
    const VecCounter p = count_from(first + uint64_t(i));
    const VecDraw d = philox_vec(key, p.low, p.high, VecU32{} + kProjectRademacher, VecU32{} + column_block);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int v = 0; v < 32; v += kLanes)
          store(block + (i + lane) * kColumns + 32 * m + v, flip_signs(Vec{} + 1.0f, d.w[m][lane] >> v));
  }
}

void draw_normals(Key key, uint64_t first, uint32_t column_block, float* block) {
  for (int64_t i = 0; i < kCoordinates; ++i) {
    const uint64_t p = first + uint64_t(i);
    for (uint32_t v = 0; v < 32; v += kLanes) {
      const VecU32 c3 = count_from(column_block * 32 + v).low;
      const VecDraw d =
          philox_vec(key, VecU32{} + uint32_t(p), VecU32{} + uint32_t(p >> 32), VecU32{} + kProjectGaussian, c3);
      for (int m = 0; m < 4; m += 2) {
        const Vec radius = square_root(minus_two_log(d.w[m]));
        Vec cosine, sine;
        circle(d.w[m + 1], &cosine, &sine);
        store(block + i * kColumns + 32 * m + v, radius * cosine);
        store(block + i * kColumns + 32 * (m + 1) + v, radius * sine);
      }
    }
  }
}

void draw_block(const ProjectArgs& args, uint64_t first, int64_t column_block, float* block) {
  if (args.gaussian)
    draw_normals(args.key, first, uint32_t(column_block), block);
  else
    draw_signs(args.key, first, uint32_t(column_block), block);
}

// sums[r][128] += sum over i of x[r][i] block[i][128]; x is [rows, 32].
template <int kR>
void multiply_rows(const float* x, const float* block, float* sums) {
  for (int64_t c = 0; c < kColumns; c += kWide * kLanes) {
    Vec acc[kR][kWide] = {};
    for (int64_t i = 0; i < kCoordinates; ++i)
      for (int r = 0; r < kR; ++r)
        for (int v = 0; v < kWide; ++v)
          acc[r][v] += x[r * kCoordinates + i] * load(block + i * kColumns + c + v * kLanes);
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kWide; ++v) {
        float* to = sums + r * kColumns + c + v * kLanes;
        store(to, load(to) + acc[r][v]);
      }
  }
}

void multiply(const float* x, const float* block, int64_t rows, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply_rows<4>(x + r * kCoordinates, block, sums + r * kColumns);
  for (; r < rows; ++r) multiply_rows<1>(x + r * kCoordinates, block, sums + r * kColumns);
}

// x[r][i] += sum over c of y[r][c] block[i][c]; x is [rows, 32].
void multiply_adjoint(const float* y, const float* block, int64_t rows, float* x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < kCoordinates; i += 4) {
      Vec acc[4] = {};
      for (int64_t c = 0; c < kColumns; c += kLanes)
        for (int k = 0; k < 4; ++k) acc[k] += load(y + r * kColumns + c) * load(block + (i + k) * kColumns + c);
      for (int k = 0; k < 4; ++k) {
        float sum = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) sum += acc[k][lane];
        x[r * kCoordinates + i + k] += sum;
      }
    }
}

// Coordinates in blocks of 128 (those of the keep mask), counted from coordinate 0.
struct Range {
  uint64_t begin, end, first;
  int64_t blocks;
  explicit Range(const ProjectArgs& args)
      : begin(args.offset),
        end(args.offset + uint64_t(args.x.cols)),
        first(args.offset / 128),
        blocks(int64_t((end - 1) / 128 - first) + 1) {}
  bool holds(uint64_t p) const { return p >= begin && p < end; }
};

struct KeepMask {
  uint32_t words[4];
  void make(const ProjectArgs& args, uint64_t block) {
    for (int i = 0; i < 4; ++i) words[i] = 0xffffffffu;
    if (args.keep < kKeepAll) draw_keep(args.key, args.keep, block * 128, 128, words);
  }
  bool kept(int64_t i) const { return words[i / 32] >> (i % 32) & 1; }
};

template <class T>
void load_piece(const ProjectArgs& args, const Range& range, const KeepMask& mask, int64_t row, int64_t rows,
                uint64_t block, int64_t piece, float* x) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = row_of<T>(args.x, row + r);
    for (int64_t i = 0; i < kCoordinates; ++i) {
      const uint64_t p = block * 128 + uint64_t(piece + i);
      x[r * kCoordinates + i] = range.holds(p) && mask.kept(piece + i) ? to_float(from[p - range.begin]) : 0.0f;
    }
  }
}

template <class T>
void forward(const ProjectArgs& args) {
  const Range range(args);
  const int64_t column_blocks = ceil_div(args.dim, kColumns), width = column_blocks * kColumns;
  const int64_t by_need = max64(1, 64 / column_blocks), by_memory = max64(1, kPartFloats / width);
  const int64_t parts = min64(min64(by_need, by_memory), max64(1, range.blocks / 16));
  const int64_t group = min64(kRows, args.x.rows), stride = width * group;
  Scratch sums(parts * stride);  // [parts][column blocks][rows][128]
  for (int64_t row = 0; row < args.x.rows; row += group) {
    const int64_t rows = min64(group, args.x.rows - row);
    run_tasks(parts * column_blocks, args.n_threads, [&](int64_t task) {
      const int64_t part = task / column_blocks, column_block = task % column_blocks;
      float* out = sums.data() + part * stride + column_block * kColumns * group;
      std::memset(out, 0, size_t(rows * kColumns) * 4);
      Scratch block(kCoordinates * kColumns), x(group * kCoordinates);
      KeepMask mask;
      for (int64_t b = range.blocks * part / parts; b < range.blocks * (part + 1) / parts; ++b) {
        const uint64_t at = range.first + uint64_t(b);
        mask.make(args, at);
        for (int64_t piece = 0; piece < 128; piece += kCoordinates) {
          const uint64_t p = at * 128 + uint64_t(piece);
          if (p >= range.end || p + uint64_t(kCoordinates) <= range.begin) continue;
          draw_block(args, p, column_block, block.data());
          load_piece<T>(args, range, mask, row, rows, at, piece, x.data());
          multiply(x.data(), block.data(), rows, out);
        }
      }
    });
    run_tasks(column_blocks, args.n_threads, [&](int64_t column_block) {
      const int64_t begin = column_block * kColumns * group;
      add_tree(sums.data(), parts, stride, begin, begin + rows * kColumns);
      const int64_t columns = min64(kColumns, args.dim - column_block * kColumns);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          args.y[(row + r) * args.y_stride + column_block * kColumns + c] +=
              args.scale * sums.data()[begin + r * kColumns + c];
    });
  }
}

}  // namespace

void project_dense(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  with_dtype(args.x.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(args); });
}

void project_dense_adjoint(const ProjectArgs& args) {
  if (args.x.rows == 0 || args.x.cols == 0) return;
  const Range range(args);
  const int64_t column_blocks = ceil_div(args.dim, kColumns), group = min64(kRows, args.x.rows);
  run_tasks(range.blocks, args.n_threads, [&](int64_t b) {
    const uint64_t at = range.first + uint64_t(b);
    Scratch block(kCoordinates * kColumns), x(group * kCoordinates), y(group * kColumns);
    KeepMask mask;
    mask.make(args, at);
    for (int64_t row = 0; row < args.x.rows; row += group)
      for (int64_t piece = 0; piece < 128; piece += kCoordinates) {
        const int64_t rows = min64(group, args.x.rows - row);
        std::memset(x.data(), 0, size_t(rows * kCoordinates) * 4);
        for (int64_t column_block = 0; column_block < column_blocks; ++column_block) {
          const int64_t columns = min64(kColumns, args.dim - column_block * kColumns);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < kColumns; ++c)
              y.data()[r * kColumns + c] =
                  c < columns ? args.y[(row + r) * args.y_stride + column_block * kColumns + c] : 0.0f;
          draw_block(args, at * 128 + uint64_t(piece), column_block, block.data());
          multiply_adjoint(y.data(), block.data(), rows, x.data());
        }
        for (int64_t r = 0; r < rows; ++r) {
          float* to = own_row_of<float>(args.x, row + r);
          for (int64_t i = 0; i < kCoordinates; ++i) {
            const uint64_t p = at * 128 + uint64_t(piece + i);
            if (range.holds(p))
              to[p - range.begin] = mask.kept(piece + i) ? args.scale * x.data()[r * kCoordinates + i] : 0.0f;
          }
        }
      }
  });
}

}  // namespace cropi::CROPI_ISA
