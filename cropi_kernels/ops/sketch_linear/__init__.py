"""The sketch of a linear layer's gradient, straight from its inputs and output gradients."""

from __future__ import annotations

import numpy as np
import torch

from ... import dispatch
from ...plan import MatrixPlan
from .._checks import check_matrix, check_offsets, check_out, on_host
from . import cpu, reference
from .reference import coordinates, sketch_matrix

__all__ = ["coordinates", "fold_inputs", "fold_outputs", "sketch_linear", "sketch_matrix"]


def fold_inputs(a: torch.Tensor, plan: MatrixPlan, *, backend: str | None = None) -> torch.Tensor:
    """Fold a layer's inputs ``a`` [tokens, cols] to [tokens, plan.folded_cols]; without a fold, ``a`` itself.

    ``a'[t, (c mod w) ^ x(c // w)] += s(c) a[t, c]``, summed in float32 and rounded once to ``a``'s dtype.
    """
    check_matrix("a", a, plan.cols, f"inputs of {plan.name}")
    if plan.col_fold is None:
        return a
    chosen = dispatch.choose("fold_columns", a, backend=backend)
    if chosen == "triton":
        from . import triton

        return triton.fold_inputs(a, plan)
    return _fold(a, plan.col_sign, plan.col_fold, plan.folded_cols, chosen)


def fold_outputs(d: torch.Tensor, plan: MatrixPlan, *, backend: str | None = None) -> torch.Tensor:
    """Fold output gradients ``d`` [tokens, rows] to [tokens, plan.folded_rows] (tied heads); else ``d`` itself."""
    check_matrix("d", d, plan.rows, f"output gradients of {plan.name}")
    if plan.row_fold is None:
        return d
    chosen = dispatch.choose("fold_columns", d, backend=backend)
    if chosen == "triton":
        from . import triton

        return triton.fold_outputs(d, plan)
    return _fold(d, plan.row_sign, plan.row_fold, plan.folded_rows, chosen)


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
    """
    if d.shape[-1] != plan.folded_rows:
        d = fold_outputs(d, plan, backend=backend)
    if a.shape[-1] != plan.folded_cols:
        a = fold_inputs(a, plan, backend=backend)
    check_matrix("d", d, plan.folded_rows, f"output gradients of {plan.name}")
    check_matrix("a", a, plan.folded_cols, f"inputs of {plan.name}")
    if d.shape[0] != a.shape[0]:
        raise ValueError(
            f"d has {d.shape[0]} tokens but a has {a.shape[0]}: they must come from the same forward"
        )
    n_segments = check_offsets(offsets, d.shape[0])
    check_out(out, n_segments, plan.n_slabs * plan.slab_rows * plan.slab_cols)
    chosen = dispatch.choose("sketch_linear", d, a, out, backend=backend)
    if chosen == "triton":
        from . import triton

        triton.sketch_linear(d, a, offsets.to(d.device), plan, out)
    elif chosen == "cpu":
        cpu.sketch_linear(d, a, on_host(offsets, d.shape[0]), plan, out)
    else:
        reference.sketch_linear(d, a, offsets, plan, out, folded=True)
    return out


def _fold(x: torch.Tensor, sign: np.ndarray, offset: np.ndarray, width: int, chosen: str) -> torch.Tensor:
    if chosen == "cpu":
        return cpu.fold_columns(x, sign, offset, width)
    return reference.fold_columns(x, torch.from_numpy(sign), torch.from_numpy(offset.astype("int64")), width)
