"""The kernels in C++: products in csrc/cpu/head_products.cpp, row work in csrc/cpu/logprob_rows.cpp."""

from __future__ import annotations

import torch

from ... import _native
from .contract import RowMath, Stats


def logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor) -> None:
    hidden, head = _native.rows_view(hidden), _native.rows_view(head)
    address = 0 if bias is None else _native.pointer(bias)
    _native.native().head_logits(
        _native.matrix(hidden),
        _native.matrix(head),
        address,
        _native.pointer(z),
        z.stride(0),
        _native.threads(),
    )


def forward(z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
    _native.native().logprob_rows(
        _native.matrix(z),
        _native.pointer(target),
        math.temperature,
        math.softcap,
        _native.pointer(stats.logp),
        _native.pointer(stats.top),
        _native.pointer(stats.log_sum),
        0 if stats.entropy is None else _native.pointer(stats.entropy),
        _native.threads(),
    )


def backward(
    z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
) -> torch.Tensor:
    _native.native().logprob_rows_backward(
        _native.matrix(z),
        _native.pointer(target),
        _native.pointer(grad),
        _native.pointer(stats.logp),
        _native.pointer(stats.top),
        _native.pointer(stats.log_sum),
        math.temperature,
        math.softcap,
        _native.threads(),
    )
    return z


def times_head(dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    head = _native.rows_view(head)
    _native.native().times_head(
        _native.matrix(dz), _native.matrix(head), _native.matrix(out), _native.threads()
    )
