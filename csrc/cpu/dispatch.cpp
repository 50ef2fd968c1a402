#include <atomic>

#include "cpu/kernels.h"
#include "cpu/levels.h"

#if defined(CROPI_HAVE_v3)
#  include <cpuid.h>
#endif

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

std::atomic<int> level{level_of(this_cpu())};

}  // namespace

CpuWords this_cpu() {
  CpuWords cpu{};
#if defined(CROPI_HAVE_v3)
  // Asked for itself: compilers differ in the feature names that their builtins know.
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) cpu.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) cpu.leaf7_ebx = ebx;
  if (__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx)) cpu.extended_ecx = ecx;
  if (cpu.leaf1_ecx >> 27 & 1) {  // OSXSAVE: XGETBV exists
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    cpu.xcr0 = eax;
  }
#endif
  return cpu;
}

int detected_level() { return level_of(this_cpu()); }
int current_level() { return level; }

void set_level(int wanted) {
  int best = detected_level();
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
