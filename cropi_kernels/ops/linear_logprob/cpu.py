"""The row work in C++ (csrc/cpu/logprob_rows.cpp): one read of the logits forward, one read and write backward."""

from __future__ import annotations

import torch

from ... import _native
from .rows import RowMath, Stats


def forward(z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
    """Fills ``stats`` (contiguous float32) from logits ``z`` [rows, V], float32, bfloat16 or float16."""
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


def backward(z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats) -> None:
    """Overwrites logits ``z`` with the gradient of ``sum_n grad_n logp_n``; rows that do not count become zero."""
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
