"""The grouped sketch as an explicit sparse matrix: the oracle of the kernels, in any float dtype."""

from __future__ import annotations

import torch

from ...plan import MatrixPlan
from ..sketch_linear.reference import folded_coordinates


def sketch_grouped(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    first_row: int,
    row_step: int,
) -> None:
    """``out[s] += S vec(G_s)``; ``a`` is already folded where the plan folds. Only groups with tokens cost anything."""
    bucket, sign = folded_coordinates(plan)
    segments, bounds = out.shape[0], offsets.tolist()
    for q, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        group, s = divmod(q, segments)
        row = first_row + group * row_step
        rows = slice(row, row + d.shape[1])
        gradient = d[begin:end].to(out.dtype).T @ a[begin:end].to(out.dtype)
        values = gradient * sign[rows].to(out)
        out[s].index_add_(0, bucket[rows].reshape(-1).to(out.device), values.reshape(-1))
