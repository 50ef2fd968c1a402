// Segments of tokens cut into parts, which are summed in any order and added up in theirs: the same bits for any thread
// count. A segment's parts are counted from its own first token, so that its neighbours cannot change them.
#pragma once
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {

struct TokenRange {
  int64_t begin, end;
};

class Parts {
 public:
  // Of at most `size` tokens; segment s is tokens offsets[s] .. offsets[s + 1].
  Parts(const int64_t* offsets, int64_t n_segments, int64_t size)
      : offsets_(offsets), n_segments_(n_segments), size_(size), memory_(2 * (n_segments + 1)) {
    int64_t* first = reinterpret_cast<int64_t*>(memory_.data());
    first[0] = 0;
    for (int64_t s = 0; s < n_segments; ++s) first[s + 1] = first[s] + ceil_div(offsets[s + 1] - offsets[s], size);
  }

  // The parts of segment s are first(s) .. first(s + 1).
  int64_t first(int64_t s) const { return reinterpret_cast<const int64_t*>(memory_.data())[s]; }
  int64_t count() const { return first(n_segments_); }

  TokenRange tokens(int64_t part) const {
    int64_t s = 0, end = n_segments_;  // first(s) <= part < first(end)
    while (end - s > 1) {
      const int64_t middle = s + (end - s) / 2;
      (first(middle) <= part ? s : end) = middle;
    }
    const int64_t t0 = offsets_[s] + (part - first(s)) * size_;
    return {t0, min64(t0 + size_, offsets_[s + 1])};
  }

 private:
  const int64_t* offsets_;
  int64_t n_segments_, size_;
  Scratch memory_;
};

}  // namespace cropi::CROPI_ISA
