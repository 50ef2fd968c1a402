// CountSketch and SJLT of sparse rows (CSR), or of dense rows of float64: element by element, in float32 or float64.
//
// A value's bucket and sign follow from its column. Where the values are many beside the columns, the draws of all columns
// are made first: 128 signs are one draw and a tile of columns is one, so they are a small table that stays in the cache.
// Where they are few beside the columns (hashed features), each value has its draws made alone, a vector of values at a
// time. Both give the same integers.
//
// A row is one thread's, and its values are added in their order: every thread count and level gives the same bits.
#include <cmath>

#include "cpu/project.h"

namespace cropi::CROPI_ISA {
namespace {

constexpr int64_t kMostTableBytes = 64 << 20;
constexpr int64_t kChunk = 256;             // values whose draws are made together where there is no table
constexpr int64_t kDrawsOfTask = 1 << 9;    // of the table
constexpr int64_t kDenseColumns = 1 << 18;  // of dense rows, whose draws are made at a time: at most
constexpr int64_t kDenseTableBytes = 16 << 20;

// p / width by a multiplication, exact for all 32-bit p (Lemire, Kaser and Kurz 2019); 64-bit columns divide.
struct Divider {
  uint64_t width, magic;
  explicit Divider(uint64_t width) : width(width), magic(width > 1 ? ~uint64_t(0) / width + 1 : 0) {}
  uint64_t operator()(uint32_t p) const { return magic ? uint64_t((unsigned __int128)(magic)*p >> 64) : p; }
  uint64_t operator()(uint64_t p) const { return p / width; }
};

struct Geometry {
  uint32_t width, group;
  explicit Geometry(const ProjectCsrArgs& args) : width(uint32_t(args.dim / args.nnz)) {
    group = uint32_t(min64(width & -width, kGroup));
  }
  uint32_t bucket(TilePlace place, uint32_t in_tile) const {
    uint32_t b = in_tile + place.shift;
    b -= b >= width ? width : 0;
    return b ^ place.low;
  }
};

// The draws of coordinates [first, first + n), by column: the coordinate less `first`.
struct Table {
  int64_t sign_draws, tiles;
  uint64_t sign_start, tile_start;  // columns are so far from the first sign, and from the first tile's beginning
  Scratch signs, places, keep;

  static int64_t draws(const ProjectCsrArgs& args, int64_t n) { return n / 128 + n / (args.dim / args.nnz) + 4; }
  static bool pays(const ProjectCsrArgs& args) {
    const int64_t n = draws(args, args.cols), most = 2 * args.n_values;
    if (n > most) return false;  // before any product: there may be 2^62 columns
    const int64_t all = n * (args.keep < kKeepAll ? 4 : 1);
    return all <= most && 16 * all * args.nnz <= kMostTableBytes;
  }

  Table(const ProjectCsrArgs& args, const Geometry& g, uint64_t first, int64_t n)
      : sign_start(first % 128),
        tile_start(first % g.width),
        signs(args.nnz * 4 * (sign_draws = int64_t(sign_start + uint64_t(n) + 127) / 128)),
        places(args.nnz * 2 * (tiles = int64_t((tile_start + uint64_t(n)) / g.width) + 1)),
        keep(args.keep < kKeepAll ? 4 * sign_draws : 1) {
    // Draws come by the vector: a buffer takes those that are too many.
    const auto tasks = [&](int64_t draws, auto&& fill) {
      run_tasks(ceil_div(draws, kDrawsOfTask), args.n_threads, [&](int64_t task) {
        uint32_t words[4 * (kDrawsOfTask + kDrawsAtOnce)];
        for (int64_t j = 0; j < args.nnz; ++j)
          fill(uint32_t(j), task * kDrawsOfTask, min64(kDrawsOfTask, draws - task * kDrawsOfTask), words);
      });
    };
    tasks(sign_draws, [&](uint32_t j, int64_t from, int64_t count, uint32_t* words) {
      draw_words(args.key, first / 128 + uint64_t(from), count, kProjectSign, j, words);
      std::memcpy(sign_bits(j) + 4 * from, words, size_t(16 * count));
      if (j > 0 || args.keep >= kKeepAll) return;
      draw_keep(args.key, args.keep, (first / 128 + uint64_t(from)) * 128, 128 * count, words);
      std::memcpy(keep_bits() + 4 * from, words, size_t(16 * count));
    });
    tasks(tiles, [&](uint32_t j, int64_t from, int64_t count, uint32_t* words) {
      draw_words(args.key, first / g.width + uint64_t(from), count, kProjectTile, j, words);
      for (int64_t t = 0; t < count; ++t)
        place(j)[from + t] = tile_place(words[4 * t], words[4 * t + 1], g.width, g.group);
    });
  }

  uint32_t* sign_bits(int64_t j) const { return reinterpret_cast<uint32_t*>(signs.data()) + j * 4 * sign_draws; }
  uint32_t* keep_bits() const { return reinterpret_cast<uint32_t*>(keep.data()); }
  TilePlace* place(int64_t j) const { return reinterpret_cast<TilePlace*>(places.data()) + j * tiles; }
};

inline float flip(float value, uint32_t bit) { return flip_sign(value, bit); }
inline double flip(double value, uint32_t bit) {
  uint64_t raw;
  std::memcpy(&raw, &value, 8);
  raw ^= uint64_t(bit) << 63;
  std::memcpy(&value, &raw, 8);
  return value;
}

// Calls add(bucket, sign bit, i) for the values i of [begin, end) that are kept, nonzero after nonzero.
template <bool kAll, class Index, class Add>
void each_by_table(const ProjectCsrArgs& args, const Geometry& g, const Table& table, const Index* column,
                   int64_t begin, int64_t end, Add&& add) {
  typedef std::conditional_t<sizeof(Index) == 4, uint32_t, uint64_t> Unsigned;
  const Divider divide(g.width);
  for (int64_t j = 0; j < args.nnz; ++j) {
    const uint32_t* signs = table.sign_bits(j);
    const TilePlace* place = table.place(j);
    const uint32_t base = uint32_t(j) * g.width;
    for (int64_t i = begin; i < end; ++i) {
      const Unsigned p = Unsigned(column[i]), in_tiles = p + Unsigned(table.tile_start);
      const uint64_t bit = p + table.sign_start, tile = divide(in_tiles);
      if (!kAll && !bit_of(table.keep_bits(), bit)) continue;
      add(base + g.bucket(place[tile], uint32_t(in_tiles - tile * g.width)), bit_of(signs, bit), i);
    }
  }
}

// Coordinate p's bit of `draw_keep_mask`. From the highest digit of `keep` down, the first fair bit that equals its digit
// decides: two draws on average, where a mask takes all digits' draws. Below the lowest digit that is 1, none can be kept.
bool is_kept(Key key, uint64_t p, uint32_t keep) {
  const int last = __builtin_ctz(keep);
  for (int level = kKeepLevels - 1; level >= last; --level) {
    const Draw fair = project_draw(key, p / 128, kProjectKeep, uint32_t(level));
    const uint32_t digit = keep >> level & 1;
    if (bit_of(fair.w, p % 128) == digit) return digit;
  }
  return false;
}

template <class Index, class Add>
void each_drawn(const ProjectCsrArgs& args, const Geometry& g, const Index* column, int64_t begin, int64_t end,
                Add&& add) {
  constexpr int64_t kRoom = kChunk + kDrawsAtOnce;
  uint32_t sign[4 * kRoom], tile[4 * kRoom];
  uint64_t sign_counter[kRoom] = {}, tile_counter[kRoom] = {};
  bool kept[kChunk];
  const auto counters = [](const uint64_t* of) {
    return [of](int64_t i) {
      VecCounter c{};
      for (int lane = 0; lane < kLanes; ++lane) {
        c.low[lane] = uint32_t(of[i + lane]);
        c.high[lane] = uint32_t(of[i + lane] >> 32);
      }
      return c;
    };
  };
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t n = min64(kChunk, end - first);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t p = args.offset + uint64_t(column[first + i]);
      sign_counter[i] = p / 128;
      tile_counter[i] = p / g.width;
      kept[i] = args.keep >= kKeepAll || is_kept(args.key, p, args.keep);
    }
    for (int64_t j = 0; j < args.nnz; ++j) {
      draw_listed(args.key, n, counters(sign_counter), kProjectSign, uint32_t(j), sign);
      draw_listed(args.key, n, counters(tile_counter), kProjectTile, uint32_t(j), tile);
      for (int64_t i = 0; i < n; ++i) {
        if (!kept[i]) continue;
        const uint64_t p = args.offset + uint64_t(column[first + i]);
        const int64_t at = 4 * (i / kLanes * kLanes + place_of_lane(int(i % kLanes)));
        const TilePlace place = tile_place(tile[at], tile[at + 1], g.width, g.group);
        const uint32_t bucket = uint32_t(j) * g.width + g.bucket(place, uint32_t(p - tile_counter[i] * g.width));
        add(bucket, bit_of(sign + at, p % 128), first + i);
      }
    }
  }
}

// The numbers times `scale`; all NaN where one is not finite.
template <class T>
void finish(T* y, int64_t n, T scale) {
  typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> Raw;
  constexpr Raw kExponent = sizeof(T) == 4 ? Raw(0x7f800000u) : Raw(0x7ff0000000000000u);
  Raw bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Raw raw;
    y[i] *= scale;
    std::memcpy(&raw, y + i, sizeof(T));
    bad |= Raw((raw & kExponent) == kExponent);
  }
  if (bad)
    for (int64_t i = 0; i < n; ++i) y[i] = T(NAN);
}

template <class T, class Index, class Each>
void add_rows(const ProjectCsrArgs& args, Each&& each) {
  const T* value = static_cast<const T*>(args.value);
  const Index *column = static_cast<const Index*>(args.column), *start = static_cast<const Index*>(args.start);
  const int64_t values = args.n_values * args.nnz;
  const int64_t work = values + (args.count == nullptr ? args.rows * args.dim / 16 : 0);
  int64_t per_task = max64(1, min64(args.rows, (args.rows << 14) / (work + 1)));
  if (args.count != nullptr) {
    // A task of a sparse result clears `dim` sums once: its rows have an eighth as many values, or are a thread's share.
    const int64_t enough = args.rows * (args.dim / 8) / (values + 1), share = ceil_div(args.rows, args.n_threads);
    per_task = max64(per_task, min64(enough, share));
  }
  run_tasks(ceil_div(args.rows, per_task), args.n_threads, [&](int64_t task) {
    const int64_t last = min64(args.rows, (task + 1) * per_task);
    if (args.count == nullptr) {
      for (int64_t r = task * per_task; r < last; ++r) {
        T* y = static_cast<T*>(args.y) + r * args.dim;
        std::memset(y, 0, size_t(args.dim) * sizeof(T));
        each(column, int64_t(start[r]), int64_t(start[r + 1]),
             [&](uint32_t bucket, uint32_t sign, int64_t i) { y[bucket] += flip(value[i], sign); });
        finish(y, args.dim, T(args.scale));
      }
      return;
    }
    // Buckets in the order in which a row meets them; `met_in` holds the last row of the task that met a bucket.
    Scratch sums(args.dim * int64_t(sizeof(T) / 4)), marks(args.dim);
    T* sum = reinterpret_cast<T*>(sums.data());
    uint32_t* met_in = reinterpret_cast<uint32_t*>(marks.data());
    std::memset(sum, 0, size_t(args.dim) * sizeof(T));
    std::memset(met_in, 0, size_t(args.dim) * 4);
    for (int64_t r = task * per_task; r < last; ++r) {
      const uint32_t mark = uint32_t(r - task * per_task) + 1;
      const int64_t from = int64_t(start[r]) * args.nnz;
      int32_t* met = args.bucket + from;
      int64_t n = 0;
      each(column, int64_t(start[r]), int64_t(start[r + 1]), [&](uint32_t bucket, uint32_t sign, int64_t i) {
        met[n] = int32_t(bucket);  // no branch: it would be guessed wrongly half the time
        n += met_in[bucket] != mark;
        met_in[bucket] = mark;
        sum[bucket] += flip(value[i], sign);
      });
      T* y = static_cast<T*>(args.y) + from;
      for (int64_t k = 0; k < n; ++k) {
        y[k] = sum[met[k]];
        sum[met[k]] = 0;
      }
      finish(y, n, T(args.scale));
      args.count[r] = n;
    }
  });
}

// The entries of the rows, one after the other: each row left room for as many as it might have had.
template <class T, class Index>
void close_gaps(const ProjectCsrArgs& args) {
  const Index* start = static_cast<const Index*>(args.start);
  T* y = static_cast<T*>(args.y);
  for (int64_t r = 0, to = 0; r < args.rows; to += args.count[r++]) {
    const int64_t from = int64_t(start[r]) * args.nnz;
    if (from == to) continue;
    std::memmove(y + to, y + from, size_t(args.count[r]) * sizeof(T));
    std::memmove(args.bucket + to, args.bucket + from, size_t(args.count[r]) * sizeof(int32_t));
  }
}

template <class T, class Index>
void sparse_rows(const ProjectCsrArgs& args) {
  const Geometry g(args);
  if (Table::pays(args)) {
    const Table table(args, g, args.offset, args.cols);
    add_rows<T, Index>(args, [&](const Index* column, int64_t begin, int64_t end, auto&& add) {
      if (args.keep < kKeepAll)
        each_by_table<false>(args, g, table, column, begin, end, add);
      else
        each_by_table<true>(args, g, table, column, begin, end, add);
    });
  } else {
    add_rows<T, Index>(args, [&](const Index* column, int64_t begin, int64_t end, auto&& add) {
      each_drawn(args, g, column, begin, end, add);
    });
  }
  if (args.count != nullptr) close_gaps<T, Index>(args);
}

// y += scale * S x for the columns of the table, in their order.
template <bool kAll>
void dense_row(const ProjectCsrArgs& args, const Geometry& g, const Table& table, const double* x, int64_t n,
               double* sum) {
  std::memset(sum, 0, size_t(args.dim) * sizeof(double));
  for (int64_t j = 0; j < args.nnz; ++j) {
    const uint32_t* signs = table.sign_bits(j);
    double* to = sum + j * g.width;
    const TilePlace* tile = table.place(j);
    int64_t in_tile = int64_t(table.tile_start), p = 0;
    while (p < n) {
      const TilePlace place = *tile++;
      const int64_t stop = min64(n, p + g.width - in_tile);
      const int64_t wrap = min64(stop, max64(p, p + int64_t(g.width) - in_tile - int64_t(place.shift)));
      const auto run = [&](int64_t last, int64_t bucket) {
        for (; p < last; ++p, ++bucket) {
          const uint64_t bit = uint64_t(p) + table.sign_start;
          if (kAll || bit_of(table.keep_bits(), bit)) to[bucket ^ int64_t(place.low)] += flip(x[p], bit_of(signs, bit));
        }
      };
      run(wrap, in_tile + place.shift);
      run(stop, max64(0, in_tile + int64_t(place.shift) - int64_t(g.width)));
      in_tile = 0;
    }
  }
}

void dense_rows(const ProjectCsrArgs& args) {
  const Geometry g(args);
  // Narrow tiles of many nonzeros have a draw for nearly every number. By the spec alone: it decides how sums are rounded.
  int64_t step = kDenseColumns;
  while (16 * Table::draws(args, step) * args.nnz > kDenseTableBytes) step /= 2;
  for (int64_t first = 0; first < args.cols; first += step) {
    const int64_t n = min64(step, args.cols - first);
    const Table table(args, g, args.offset + uint64_t(first), n);
    run_tasks(args.rows, args.n_threads, [&](int64_t r) {
      Scratch sums(2 * args.dim);
      double *sum = reinterpret_cast<double*>(sums.data()), *y = static_cast<double*>(args.y) + r * args.dim;
      const double* x = static_cast<const double*>(args.value) + r * args.row_stride + first;
      if (args.keep < kKeepAll)
        dense_row<false>(args, g, table, x, n, sum);
      else
        dense_row<true>(args, g, table, x, n, sum);
      for (int64_t i = 0; i < args.dim; ++i) y[i] += args.scale * sum[i];
    });
  }
}

}  // namespace

void project_csr(const ProjectCsrArgs& args) {
  if (args.rows == 0) return;
  if (args.start == nullptr)
    dense_rows(args);
  else if (args.wide_value)
    args.wide_index ? sparse_rows<double, int64_t>(args) : sparse_rows<double, int32_t>(args);
  else
    args.wide_index ? sparse_rows<float, int64_t>(args) : sparse_rows<float, int32_t>(args);
}

}  // namespace cropi::CROPI_ISA
