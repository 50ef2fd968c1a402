"""Directions of sketches."""

from __future__ import annotations

import torch


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[n, dim]`` divided by their lengths, float32; zeros stay zeros.

    In float64: of float32 numbers squares may be beyond float32, at either end, and a bound on the length that is left
    for rounding would make short rows shorter still.
    """
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=torch.finfo(torch.float64).tiny).float()
