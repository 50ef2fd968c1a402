// The sketch of a vector's gradients: a signed scatter of a few thousand numbers per segment. `index_add_` along the
// second axis takes a tensor iteration per number: 0.5 ms for a norm scale of 576, and a model has sixty of them.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {
namespace {

void add_block(const float* gradient, const int8_t* sign, int64_t n, int64_t xor_, float* out) {
  int64_t i = 0;
  // Eight aligned numbers stay side by side.
  for (; i + 8 <= n; i += 8) {
    float terms[8];
    for (int k = 0; k < 8; ++k) terms[k] = float(sign[i + k]) * gradient[i + k];
    float* to = out + (i ^ xor_);
    store8(to, load8(to) + load8(terms));
  }
  for (; i < n; ++i) out[i ^ xor_] += float(sign[i]) * gradient[i];
}

}  // namespace

void sketch_vector(const SketchVectorArgs& args) {
  for (int64_t s = 0; s < args.n_segments; ++s) {
    const float* gradient = args.gradient + s * args.gradient_stride;
    float* out = args.out + s * args.out_stride;
    const int64_t* of = args.blocks;
    for (int64_t first = 0; first < args.size; first += args.block, of += 2) {
      add_block(gradient + first, args.sign + first, min64(args.size - first, args.block), of[1], out + of[0]);
    }
  }
}

}  // namespace cropi::CROPI_ISA
