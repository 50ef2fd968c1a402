// Sums over parts that are computed in any order and added up in one: a fixed tree, so that every number of threads
// gives the same bits. Two neighbours are added as soon as both are there, by the thread that finished last, while
// they are still in its cache; their memory serves the parts to come.
#pragma once
#include "cpu/project.h"

namespace cropi::CROPI_ISA {

class PartialSums {
 public:
  // Memory for every part is reserved, but only what is in use at a time is touched: a few parts more than threads.
  PartialSums(int64_t parts, int64_t size) : parts_(parts), size_(size), sums_(parts * size), state_(3 * parts) {
    std::memset(state_.data(), 0, size_t(3 * parts) * 4);
  }

  float* begin(int64_t part) {
    uint32_t slot = 0;
    while (__atomic_exchange_n(in_use() + slot, 1u, __ATOMIC_ACQUIRE))
      slot = slot + 1 < uint32_t(parts_) ? slot + 1 : 0;
    slot_of()[part] = slot;
    std::memset(sum(part), 0, size_t(size_) * 4);
    return sum(part);
  }

  // Part q holds the sum of [q, q + step), step = 1, 2, 4, ...; the second of two neighbours to arrive adds them.
  void finish(int64_t part) {
    for (int64_t q = part, step = 1; step < parts_; step *= 2) {
      const int64_t left = q & -(2 * step), right = left + step;
      if (right < parts_) {
        if (!__atomic_exchange_n(arrived() + right, 1u, __ATOMIC_ACQ_REL)) return;
        float* to = sum(left);
        const float* from = sum(right);
        for (int64_t i = 0; i < size_; ++i) to[i] += from[i];
        __atomic_store_n(in_use() + slot_of()[right], 0u, __ATOMIC_RELEASE);
      }
      q = left;
    }
  }

  // Of all parts, when all are finished.
  const float* total() const { return sum(0); }

 private:
  uint32_t* in_use() const { return reinterpret_cast<uint32_t*>(state_.data()); }
  uint32_t* arrived() const { return in_use() + parts_; }  // a neighbour waits for the pair whose right one this is
  uint32_t* slot_of() const { return in_use() + 2 * parts_; }
  float* sum(int64_t part) const { return sums_.data() + int64_t(slot_of()[part]) * size_; }

  int64_t parts_, size_;
  Scratch sums_, state_;
};

}  // namespace cropi::CROPI_ISA
