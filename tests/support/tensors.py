"""Tensors of random numbers, and how far two tables of rows are apart."""

from __future__ import annotations

import torch


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, drawn in float32 on the CPU: the same whatever the dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of two rows, relative to the length of the row of ``y``."""
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())
