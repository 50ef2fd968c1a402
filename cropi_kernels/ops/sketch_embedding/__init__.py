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
    """Add the sketches of ``G_s = sum_{t in s} onehot(rows[t])^T x[t]`` to ``out``; G is never formed by the kernels.

    >>> plan = plan_matrix(SketchSpec(), "model.embed_tokens.weight", 49152, 576, "embedding")
    >>> ids, x = torch.tensor([7, 7, 21]), torch.randn(3, 576)
    >>> sketch_embedding(x, ids, torch.tensor([0, 2, 3]), plan, torch.zeros(2, 32768)).shape
    torch.Size([2, 32768])

    Args:
        x: gradients of the looked-up vectors [tokens, cols], float32, bfloat16 or float16.
        rows: int64 [tokens], the row looked up by each token (token or position ids), in [0, plan.rows).
        offsets, plan, out, backend: as in `sketch_linear`. A tied head folds the rows; signs ride along.

    Raises:
        ValueError: names the argument, its value and the remedy. A row out of range raises it on a CPU. A GPU is not
            waited for: there such a row makes its segment NaN.
        RuntimeError: the backend that was named cannot serve the call.
    """
    ops.SKETCH(plain(x), rows, offsets, out, recipe_of(plan), backend)
    return out
