#include <atomic>

#include "cpu/kernels.h"

namespace cropi {
namespace {

#define CROPI_ENTRY_V1(name, Args) v1::name,
#define CROPI_ENTRY_V3(name, Args) v3::name,
#define CROPI_ENTRY_V4(name, Args) v4::name,
const Kernels kV1 = {CROPI_KERNELS(CROPI_ENTRY_V1)};
#if defined(CROPI_HAVE_v3)
const Kernels kV3 = {CROPI_KERNELS(CROPI_ENTRY_V3)};
#endif
#if defined(CROPI_HAVE_v4)
const Kernels kV4 = {CROPI_KERNELS(CROPI_ENTRY_V4)};
#endif

int detect() {
#if defined(CROPI_HAVE_v3)
  __builtin_cpu_init();  // feature names: clang before 17 does not know "x86-64-v4"
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : v3 ? 3 : 1;
#else
  return 1;
#endif
}

std::atomic<int> level{detect()};

}  // namespace

int detected_level() { return detect(); }
int current_level() { return level; }

void set_level(int wanted) {
  int best = detect();
  int capped = wanted < best ? wanted : best;
  level = capped >= 4 ? 4 : capped >= 3 ? 3 : 1;
}

const Kernels& kernels() {
#if defined(CROPI_HAVE_v4)
  if (level == 4) return kV4;
#endif
#if defined(CROPI_HAVE_v3)
  if (level >= 3) return kV3;
#endif
  return kV1;
}

}  // namespace cropi
