"""Rows whose columns lie apart, as the kernels want them: contiguous pieces, some megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def contiguous_columns(x: torch.Tensor, most_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first column, piece) with contiguous columns: ``x`` itself where it has them."""
    if x.shape[1] <= 1 or x.stride(1) == 1:
        yield 0, x
        return
    step = max(128, most_bytes // max(1, x.shape[0] * x.element_size()) // 128 * 128)
    for start in range(0, x.shape[1], step):
        yield start, x[:, start : start + step].contiguous()
