"""The sketch of a linear layer's gradient, straight from its inputs and output gradients."""

from __future__ import annotations

import torch

from ..._library import plain
from ...plan import MatrixPlan, recipe_of
from . import ops
from .reference import coordinates, sketch_matrix

__all__ = ["coordinates", "fold_inputs", "fold_outputs", "sketch_linear", "sketch_matrix"]


def fold_inputs(a: torch.Tensor, plan: MatrixPlan, *, backend: str | None = None) -> torch.Tensor:
    """Fold a layer's inputs ``a`` [tokens, cols] to [tokens, plan.folded_cols]; without a fold, ``a`` itself.

    ``a'[t, (c mod w) ^ x(c // w)] += s(c) a[t, c]``, summed in float32 and rounded once to ``a``'s dtype
    (docs/sketch.md). Layers of one parent that read the same input have the same fold: fold once, sketch several times.

    Raises:
        ValueError: ``a`` is not a dense floating-point [tokens, plan.cols].
        RuntimeError: the backend that was named cannot serve the call; says why.

    >>> fold_inputs(torch.ones(3, 4), plan_matrix(SketchSpec(), "w", 8, 4, role="linear")).shape[0]
    3
    """
    if plan.folded_cols == plan.cols:
        ops.check_unfolded(a, plan, rows=False)
        return a
    return ops.FOLD(plain(a), recipe_of(plan), False, backend)


def fold_outputs(d: torch.Tensor, plan: MatrixPlan, *, backend: str | None = None) -> torch.Tensor:
    """Fold output gradients ``d`` [tokens, rows] to [tokens, plan.folded_rows] (tied heads); else ``d`` itself.

    As `fold_inputs`, over rows in place of columns, and with the same errors.
    """
    if plan.folded_rows == plan.rows:
        ops.check_unfolded(d, plan, rows=True)
        return d
    return ops.FOLD(plain(d), recipe_of(plan), True, backend)


def sketch_linear(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Add the sketches of ``G_s = sum_{t in s} d[t]^T a[t]`` to ``out``; G is never formed by the kernels.

    Args:
        d: output gradients [tokens, rows], or already folded by `fold_outputs` [tokens, plan.folded_rows].
        a: inputs [tokens, cols], or already folded by `fold_inputs` [tokens, plan.folded_cols].
        offsets: int64 [segments + 1] on the CPU, where they are checked, or on ``d``'s device, where they are not:
            segment s is tokens ``offsets[s] .. offsets[s + 1]``.
        plan: `plan_matrix` of the parameter.
        out: float32 [segments, plan.n_slabs * 32768], added to in place. float64 only on the reference.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    The sums are float32 in an order that depends on the segment alone: equal bits for any thread count and for any
    neighbours in the batch. On a CPU over at most 256 tokens, then over blocks; on a GPU over all block pairs and
    tokens of a chunk (512 tokens, 24 pairs), then over the chunks.

    >>> plan, out = plan_matrix(SketchSpec(), "w", 8, 4, role="linear"), torch.zeros(1, 32768)
    >>> _ = sketch_linear(torch.ones(3, 8), fold_inputs(torch.ones(3, 4), plan), torch.tensor([0, 3]), plan, out)
    >>> round(float(out.norm()), 3)  # of the gradient, which is 3 everywhere: 3 sqrt(32)
    16.971
    """
    ops.SKETCH(plain(d), plain(a), offsets, out, recipe_of(plan), backend)
    return out
