"""The kernels in C++: products in csrc/cpu/head_products.cpp, row work in csrc/cpu/logprob_rows.cpp."""

from __future__ import annotations

import torch

from ... import _native
from .contract import RowMath, Stats


def logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor) -> None:
    hidden, head = _native.rows_view(hidden), _native.rows_view(head)
    address = 0 if bias is None else bias.data_ptr()
    _native.native().head_logits(
        _native.matrix(hidden), _native.matrix(head), address, z.data_ptr(), z.stride(0), _native.threads()
    )


def forward(z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
    _native.native().logprob_rows(
        _native.matrix(z),
        target.data_ptr(),
        math.temperature,
        math.softcap,
        stats.logp.data_ptr(),
        stats.top.data_ptr(),
        stats.log_sum.data_ptr(),
        0 if stats.entropy is None else stats.entropy.data_ptr(),
        _native.threads(),
    )


def backward(
    z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
) -> torch.Tensor:
    _native.native().logprob_rows_backward(
        _native.matrix(z),
        target.data_ptr(),
        grad.data_ptr(),
        stats.logp.data_ptr(),
        stats.top.data_ptr(),
        stats.log_sum.data_ptr(),
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
