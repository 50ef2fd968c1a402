"""Sums of rows in a fixed order, on any device."""

from __future__ import annotations

import torch


def add_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[index] += rows``, in place: the same bits on every run. On a GPU `index_add_` adds in the order of arrival.

    >>> add_rows(torch.zeros(2), torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([2., 4.])
    """
    if out.is_cuda:
        return out.index_put_((index,), rows, accumulate=True)  # sorts the index first
    return out.index_add_(0, index, rows)
