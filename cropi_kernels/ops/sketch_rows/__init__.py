"""The sketch of an embedding's gradient: only the rows that occur are touched, no [vocabulary, hidden] buffer."""

from __future__ import annotations

import torch

from ..._library import plain
from ...plan import MatrixPlan, recipe_of
from . import ops

__all__ = ["sketch_embedding"]


def sketch_embedding(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Add the sketches of ``G_s = sum_{t in s} onehot(rows[t])^T x[t]`` to ``out``.

    Args:
        x: gradients of the looked-up vectors [tokens, cols].
        rows: int64 [tokens], the row looked up by each token (token or position ids), in [0, plan.rows).
        offsets, plan, out, backend: as in `sketch_linear`. A tied head folds the rows; signs ride along.
    """
    ops.SKETCH(plain(x), rows, offsets, out, recipe_of(plan), backend)
    return out
