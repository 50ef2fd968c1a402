"""Operands whose rows lie further apart than 2^31 elements reach: the same bits as of rows side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cropi_kernels import (
    ProjectionSpec,
    SketchSpec,
    fold_inputs,
    plan_matrix,
    project,
    sketch_embedding,
    sketch_linear,
)
from cropi_kernels.ops.norm_grad import norm_grad

STRIDE = (1 << 30) + 8  # the third row begins beyond 2^31
OFFSETS = torch.tensor([0, 1, 3])
PLAN = plan_matrix(SketchSpec(dim=32768, width=None), "w", 40, 48)
FOLDED = plan_matrix(SketchSpec(dim=32768, width=16), "v", 40, 48)


def far(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory that is mapped but, apart from its rows, never touched: torch.zeros would write it."""
    spread = np.zeros((x.shape[0] - 1) * STRIDE + x.shape[1], np.int16)
    return torch.from_numpy(spread).view(x.dtype).as_strided(x.shape, (STRIDE, 1)).copy_(x)


def linear(d: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, 32768)
    sketch_linear(d[:, :40], a, OFFSETS, PLAN, out, backend="triton")
    return out


def embedding(d: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, 32768)
    sketch_embedding(a, torch.tensor([3, 39, 3]), OFFSETS, PLAN, out, backend="triton")
    return out


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "fold_inputs": lambda d, a: fold_inputs(a, FOLDED, backend="triton"),
    "sketch_linear": linear,
    "sketch_embedding": embedding,
    "norm_grad": lambda d, a: norm_grad(a, d, OFFSETS, 1e-6, centered=False, backend="triton")[0],
    "project": lambda d, a: project(a, ProjectionSpec(64), backend="triton"),
}


@pytest.mark.parametrize("op", CALLS)
def test_rows_far_apart(op: str, half: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    d, a = (torch.randn(3, 48, generator=g).to(half) for _ in range(2))
    near = CALLS[op](d, a)
    got = CALLS[op](far(d), far(a))
    assert torch.equal(got, near) and near.isfinite().all() and near.any()
