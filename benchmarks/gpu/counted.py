"""Three launches for `ncu`: the slab of gate_proj folded to 64, the fold of 8960 features, a norm. See build.sh."""

from __future__ import annotations

import common
import torch

from cropi_kernels import SketchSpec, fold_inputs, norm_grad, plan_matrix, sketch_linear

TOKENS = 16384


def main() -> None:
    gate = plan_matrix(SketchSpec(), "model.layers.0.mlp.gate_proj.weight", 8960, 1536)
    down = plan_matrix(SketchSpec(), "model.layers.0.mlp.down_proj.weight", 1536, 8960)
    make = lambda n: torch.randn(TOKENS, n, device="cuda").bfloat16()  # noqa: E731
    d, x, kept = make(8960), make(1536), make(64)
    offsets, out = common.ragged(TOKENS, 16).cuda(), torch.zeros(16, 32768, device="cuda")
    sketch_linear(d, kept, offsets, gate, out)
    fold_inputs(d, down)
    norm_grad(x.float(), x, offsets, 1e-6, centered=False, with_bias=False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
