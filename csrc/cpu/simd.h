// Small vector vocabulary for kernels that are compiled once per instruction set.
// Everything lives in namespace cropi::CROPI_ISA: nothing inline may be shared between levels.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/parallel.h"
#include "cropi/dtype.h"

namespace cropi::CROPI_ISA {

#if defined(CROPI_ISA_v4)
constexpr int kLanes = 16;
#elif defined(CROPI_ISA_v3)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 and NEON
#endif

// `aligned(4)` and `may_alias` make plain loads and stores through these types legal at any float address.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecU __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t VecI32 __attribute__((vector_size(4 * kLanes)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec8U __attribute__((vector_size(32), aligned(4), may_alias));

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
static inline Vec8 load8(const float* p) { return *reinterpret_cast<const Vec8U*>(p); }
static inline void store8(float* p, Vec8 v) { *reinterpret_cast<Vec8U*>(p) = v; }

struct BFloat16 {
  uint16_t bits;
};

#if defined(__aarch64__)
typedef __fp16 Float16;  // GCC has no _Float16 in C++ there before version 13; both convert to float and back alike
#else
typedef _Float16 Float16;
#endif

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline float to_float(Float16 x) { return float(x); }

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat16* out) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((u >> 16) | 0x40u);
    return;
  }
  out->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static inline void from_float(float x, Float16* out) { *out = Float16(x); }

// Calls f with a null pointer of the C++ type that stands for `dtype`.
template <class F>
static inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f(static_cast<float*>(nullptr)); return;
    case DType::bf16: f(static_cast<BFloat16*>(nullptr)); return;
    case DType::f16: f(static_cast<Float16*>(nullptr)); return;
  }
}

template <class T>
static inline const T* row_of(const MatrixView& m, int64_t r) {
  return static_cast<const T*>(m.data) + r * m.row_stride;
}

// Of a matrix that the kernel writes.
template <class T>
static inline T* own_row_of(const MatrixView& m, int64_t r) {
  return static_cast<T*>(const_cast<void*>(m.data)) + r * m.row_stride;
}

template <class F>
static inline void run_tasks(int64_t n_tasks, int n_threads, F&& f) {
  using Fn = std::remove_reference_t<F>;
  parallel_for(n_tasks, n_threads, [](void* ctx, int64_t task) { (*static_cast<Fn*>(ctx))(task); }, &f);
}

// Calls f(r) for every row, some rows a task.
template <class F>
static inline void run_rows(int64_t rows, int64_t per_task, int n_threads, F&& f) {
  run_tasks(ceil_div(rows, per_task), n_threads, [&](int64_t task) {
    const int64_t end = min64(rows, (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; ++r) f(r);
  });
}

// 64-byte aligned scratch memory, uninitialised. malloc, not a standard container: an inline member of one,
// emitted here with AVX-512, could be the copy that the linker keeps for every level.
class Scratch {
 public:
  explicit Scratch(int64_t n_floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, (size_t(n_floats) * 4 + 127) & ~size_t(63)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace cropi::CROPI_ISA
