"""Directions of sketches."""

from __future__ import annotations

import torch

BLOCK = 1 << 18  # numbers that are float64 at one time: a table of 131 MB took 400 MB more as a whole


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[n, dim]`` divided by their lengths, float32; zeros stay zeros.

    In float64: of float32 numbers squares may be beyond float32, at either end, and a bound on the length that is left
    for rounding would make short rows shorter still.
    """
    made = torch.empty_like(rows, dtype=torch.float32)
    count = max(1, BLOCK // rows.shape[1])
    for some, into in zip(rows.split(count), made.split(count), strict=True):
        into.copy_(torch.nn.functional.normalize(some.double(), dim=1, eps=torch.finfo(torch.float64).tiny))
    return made
