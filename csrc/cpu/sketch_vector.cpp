// The sketch of a vector's gradients: a signed scatter of a few thousand numbers per segment. `index_add_` along the
// second axis takes a tensor iteration per number: 0.5 ms for a norm scale of 576, and a model has sixty of them.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace cropi::CROPI_ISA {

void sketch_vector(const SketchVectorArgs& args) {
  for (int64_t s = 0; s < args.n_segments; ++s) {
    const float* gradient = args.gradient + s * args.gradient_stride;
    float* out = args.out + s * args.out_stride;
    for (int64_t i = 0; i < args.size; ++i) out[args.position[i]] += args.sign[i] * gradient[i];
  }
}

}  // namespace cropi::CROPI_ISA
