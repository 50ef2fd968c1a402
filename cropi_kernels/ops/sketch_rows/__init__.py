"""The sketch of an embedding's gradient: only the rows that occur are touched, no [vocabulary, hidden] buffer."""

from __future__ import annotations

import numpy as np
import torch

from ... import _native, dispatch
from ...plan import MatrixPlan
from .._checks import check_matrix, check_offsets, check_out, on_host
from ..sketch_linear import fold_inputs
from .reference import sketch_rows as sketch_rows_reference

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
    check_matrix("x", x, plan.cols, f"gradients of {plan.name}")
    if rows.shape != (x.shape[0],) or rows.dtype != torch.int64:
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}: it must be int64 [{x.shape[0]}], a row per token"
        )
    # Reading ids from a device would make the host wait: there, one that is out of range makes its segment NaN.
    if rows.numel() and not rows.is_cuda and not 0 <= int(rows.min()) <= int(rows.max()) < plan.rows:
        raise ValueError(
            f"rows runs from {int(rows.min())} to {int(rows.max())}: {plan.name} has rows 0 .. {plan.rows - 1}"
        )
    n_segments = check_offsets(offsets, x.shape[0])
    check_out(out, n_segments, plan.n_slabs * plan.slab_rows * plan.slab_cols)
    if rows.device != x.device:
        raise ValueError(f"rows is on {rows.device} but x on {x.device}: move one to the other")
    without = {"triton": "the inputs of this plan are folded" if plan.col_fold is not None else None}
    chosen = dispatch.choose("sketch_embedding", x, out, backend=backend, without=without)
    if chosen == "triton":
        from . import triton

        triton.sketch_rows(x, rows, offsets.to(x.device), plan, out)
        return out
    if chosen != "cpu":
        return sketch_rows_reference(x, rows, offsets, plan, out)
    offsets = on_host(offsets, x.shape[0])
    x = fold_inputs(x, plan, backend=backend)
    folded, scale = plan.fold_rows(rows.numpy())
    folded, scale = np.ascontiguousarray(folded, np.int64), np.ascontiguousarray(scale)
    x = _native.rows_view(x)
    _native.native().sketch_rows(
        _native.matrix(x),
        _native.address(folded),
        _native.address(scale),
        _native.slab_plan(plan, None, plan.col_sign if plan.col_fold is None else None),
        n_segments,
        offsets.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        _native.threads(),
    )
    return out
