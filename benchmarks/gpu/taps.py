"""A layer's backward pass as the sketcher's engine takes it, at a real model's shapes, against an operator a tap.

The one row, before whole passes, in which gradients go in one launch, sums wait for the end of the pass, and kernels
are launched past Triton's own way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cropi_kernels import SketchSpec, plan_vector
from cropi_kernels.sketcher.batch.segments import Segments
from cropi_kernels.sketcher.sums.engine import Norm, Operators, Site
from cropi_kernels.sketcher.sums.gpu_engine import GpuEngine
from cropi_kernels.sketcher.sums.matrix import SlabMatrix

HIDDEN, NARROW, INNER = 1536, 256, 8960
BATCH, LENGTH = 4, 500
REPEATS = 6
DTYPE, SPEC, SITE = torch.bfloat16, SketchSpec(), Site("a layer")
# Of the norm of a segment's sketch: a number is added up in at most 1024 steps of either order, 2^-23 each.
ALLOWED = 1024 * 2.0**-23
Run = Callable[[Operators], None]


def layer() -> Run:
    """Its calls, on operands that are made once."""

    def matrix(name: str, rows: int, cols: int) -> SlabMatrix:
        return SlabMatrix(SPEC, f"model.layers.0.{name}.weight", rows, cols, "linear")

    def made(features: int) -> torch.Tensor:
        return torch.randn(BATCH, LENGTH, features, device="cuda").to(DTYPE)

    q, k, v = (matrix(f"attn.{n}", rows, HIDDEN) for n, rows in (("q", HIDDEN), ("k", NARROW), ("v", NARROW)))
    o, down = matrix("attn.o", HIDDEN, HIDDEN), matrix("mlp.down", HIDDEN, INNER)
    gate, up = (matrix(f"mlp.{n}", INNER, HIDDEN) for n in ("gate", "up"))
    inputs = {id(m): made(m.cols) for m in (q, o, gate, down)}
    order = [(down, down), (up, gate), (gate, gate), (o, o), (v, q), (k, q), (q, q)]
    gradients = [made(m.rows) for m, _ in order]
    wide, norm = (
        inputs[id(q)].float(),
        Norm(False, 1e-6, plan_vector(SPEC, "model.layers.0.norm.weight", HIDDEN), None),
    )

    def run(engine: Operators) -> None:
        kept = {key: engine.fold(x, m, SITE) for (key, x), m in zip(inputs.items(), (q, o, gate, down))}
        for (m, first), dy in zip(order, gradients):
            engine.add_linear(dy, kept[id(first)], m, SITE)
            if first is q:
                engine.add_bias(dy, plan_vector(SPEC, f"{m.name}.bias", m.rows), SITE)
        engine.add_norm(gradients[0], wide, norm, SITE)

    return run


def sketched(run: Run, kind: type[Operators]) -> tuple[torch.Tensor, float]:
    """Sketches of the rows, one a segment, and the host's microseconds."""
    where = Segments.of(torch.arange(BATCH), BATCH, LENGTH, None)
    engine = kind(where, torch.zeros(BATCH, SPEC.base_dim, device="cuda"))
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(engine)
    out = engine.settle()
    return out, (time.perf_counter() - start) * 1e6


def check() -> dict[str, Any]:
    run = layer()
    runs = [sketched(run, GpuEngine) for _ in range(REPEATS)]
    operators = [sketched(run, Operators) for _ in range(REPEATS)]
    right = operators[0][0]
    error = float(((runs[0][0] - right).norm(dim=1) / right.norm(dim=1)).max())
    repeatable = all(torch.equal(out, runs[0][0]) for out, _ in runs)
    return {
        "error": error,
        "of_bound": error / ALLOWED,
        "repeatable": repeatable,
        "ok": repeatable and error <= ALLOWED,
        "host_us": min(us for _, us in runs),
        "host_us_by_operators": min(us for _, us in operators),
    }
