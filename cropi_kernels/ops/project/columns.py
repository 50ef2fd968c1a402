"""Rows whose columns lie apart, as the kernels want them: contiguous pieces, some megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_COPY, _DEVICE_COPY = 1 << 24, 1 << 26  # bytes copied at a time


def contiguous_columns(x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first column, piece) with contiguous columns: ``x`` itself where it has them."""
    if x.shape[1] <= 1 or x.stride(1) == 1:
        yield 0, x
        return
    most = _DEVICE_COPY if x.is_cuda else _COPY
    step = max(128, most // max(1, x.shape[0] * x.element_size()) // 128 * 128)
    for start in range(0, x.shape[1], step):
        yield start, x[:, start : start + step].contiguous()
