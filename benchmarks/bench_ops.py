"""Micro-benchmarks of the sketch ops beside plain torch: ``pytest benchmarks/bench_ops.py --benchmark-group-by=group``.

Shapes are SmolLM2-135M's, 1024 tokens in 5 ragged segments. The floor of the folded sketch is one read of D and A, that
of the unfolded one the weight-gradient products themselves (torch.mm).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cropi_kernels import SketchSpec, fold_inputs, norm_grad, plan_matrix, sketch_embedding, sketch_linear

TOKENS = 1024
CUTS = torch.tensor([0, 137, 400, 401, 790, TOKENS])
SHAPES = [(576, 576), (1536, 576), (576, 1536)]

Bench = Callable[..., Any]


def data(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(TOKENS, rows, generator=generator).to(dtype),
        torch.randn(TOKENS, cols, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, None], ids=lambda w: f"width={w or 'full'}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sketch_linear(
    benchmark: Bench, shape: tuple[int, int], width: int | None, dtype: torch.dtype
) -> None:
    benchmark.group = f"weight gradient {shape}"  # type: ignore[attr-defined]
    d, a = data(*shape, dtype)
    plan = plan_matrix(SketchSpec(width=width), "model.layers.0.mlp.up_proj.weight", *shape)
    out = torch.zeros(len(CUTS) - 1, 32768)
    folded = fold_inputs(a, plan)
    benchmark(sketch_linear, d, folded, CUTS, plan, out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_weight_gradient(benchmark: Bench, shape: tuple[int, int]) -> None:
    benchmark.group = f"weight gradient {shape}"  # type: ignore[attr-defined]
    d, a = data(*shape)
    out = torch.empty(*shape)

    def products() -> None:
        for begin, end in itertools.pairwise(CUTS.tolist()):
            torch.mm(d[begin:end].T, a[begin:end], out=out)

    benchmark(products)


@pytest.mark.parametrize("width", [64, 128])
def test_fold_inputs(benchmark: Bench, width: int) -> None:
    benchmark.group = "read the inputs once"  # type: ignore[attr-defined]
    _, a = data(1, 1536)
    benchmark(fold_inputs, a, plan_matrix(SketchSpec(width=width), "a.b.c.weight", 576, 1536))


def test_copy(benchmark: Bench) -> None:
    benchmark.group = "read the inputs once"  # type: ignore[attr-defined]
    _, a = data(1, 1536)
    benchmark(torch.empty_like(a).copy_, a)


def test_sketch_embedding(benchmark: Bench) -> None:
    benchmark.group = "embedding"  # type: ignore[attr-defined]
    _, x = data(1, 576)
    rows = torch.randint(0, 49152, (TOKENS,), generator=torch.Generator().manual_seed(1))
    plan = plan_matrix(SketchSpec(), "model.embed_tokens.weight", 49152, 576, "tied")
    benchmark(sketch_embedding, x, rows, CUTS, plan, torch.zeros(len(CUTS) - 1, 32768))


def test_norm_grad(benchmark: Bench) -> None:
    benchmark.group = "norm scale"  # type: ignore[attr-defined]
    dy, x = data(576, 576)
    benchmark(norm_grad, x, dy, CUTS, 1e-5, centered=False)
