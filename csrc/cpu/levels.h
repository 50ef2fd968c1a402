// Which instruction-set level a processor serves, from what CPUID and XGETBV say of it.
#pragma once
#include <cstdint>

namespace cropi {

// 0 where a leaf does not exist, and on other processors than x86.
struct CpuWords {
  uint32_t leaf1_ecx, leaf7_ebx, extended_ecx;  // of leaves 1, 7 (subleaf 0) and 0x80000001
  uint32_t xcr0;                                // register state that the operating system keeps
};

// 1, 3 or 4: every instruction that -march=x86-64-v3 (v4) lets a compiler emit must be there, not only those that the
// kernels name, and the system must keep the registers.
constexpr int level_of(const CpuWords& cpu) {
  constexpr uint32_t kLeaf1 = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;      // FMA MOVBE OSXSAVE AVX F16C
  constexpr uint32_t kLeaf7 = 1u << 3 | 1u << 5 | 1u << 8;                               // BMI1 AVX2 BMI2
  constexpr uint32_t kExtended = 1u << 5;                                                // LZCNT
  constexpr uint32_t kLeaf7Wide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // AVX512 F DQ CD BW VL
  constexpr uint32_t kYmm = 0x06, kZmm = 0xe6;
  const auto all = [](uint32_t word, uint32_t bits) { return (word & bits) == bits; };
  const bool v3 = all(cpu.leaf1_ecx, kLeaf1) && all(cpu.leaf7_ebx, kLeaf7) && all(cpu.extended_ecx, kExtended) &&
                  all(cpu.xcr0, kYmm);
  const bool v4 = v3 && all(cpu.leaf7_ebx, kLeaf7Wide) && all(cpu.xcr0, kZmm);
  return v4 ? 4 : v3 ? 3 : 1;
}

CpuWords this_cpu();

}  // namespace cropi
