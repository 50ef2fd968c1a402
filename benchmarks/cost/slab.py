"""The slab sketch without folding, against torch.mm on the products that it replaces."""

from __future__ import annotations

import itertools
import statistics

import torch

from benchmarks.cost.timing import alternate
from cropi_kernels import SketchSpec, plan_matrix, sketch_linear


def gemm_rate(rounds: int, tokens: int) -> list[str]:
    """The unfolded slab sketch against torch.mm, on SmolLM2's weight-gradient products, 4 ragged segments."""
    lines = ["| unfolded slab sketch, k = 32768 | torch.mm GF/s | sketch GF/s | share |", "|---|---|---|---|"]
    cuts = torch.tensor([0, tokens // 5, tokens // 2, tokens * 3 // 4, tokens])
    for rows, cols in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        plan = plan_matrix(SketchSpec(width=None), f"model.layers.0.{rows}x{cols}.weight", rows, cols)
        d, a, out = torch.randn(tokens, rows), torch.randn(tokens, cols), torch.zeros(4, 32768)
        ranges = list(itertools.pairwise(cuts.tolist()))
        products = [torch.empty(rows, cols) for _ in ranges]

        def plain(_: int, d=d, a=a, ranges=ranges, products=products) -> None:  # type: ignore[no-untyped-def]
            for (begin, end), g in zip(ranges, products, strict=True):
                torch.mm(d[begin:end].T, a[begin:end], out=g)

        def slab(_: int, d=d, a=a, plan=plan, out=out) -> None:  # type: ignore[no-untyped-def]
            sketch_linear(d, a, cuts, plan, out)

        costs = alternate({"mm": plain, "slab": slab}, rounds * 4)
        seconds = {name: [c.seconds for c in values] for name, values in costs.items()}
        flops = 2.0 * tokens * rows * cols / 1e9
        ratio = statistics.median(a / b for a, b in zip(seconds["mm"], seconds["slab"], strict=True))
        mm, ours = (flops / statistics.median(seconds[k]) for k in ("mm", "slab"))
        lines.append(f"| [{rows}, {cols}], {tokens} tokens | {mm:.0f} | {ours:.0f} | {ratio:.2f} |")
    return lines
