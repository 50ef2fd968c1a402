"""The sketch of a stack of linear layers (experts) of which every token went through a few."""

from __future__ import annotations

import torch

from ..._library import plain
from ..._spec_base import check_int
from ...plan import MatrixPlan, recipe_of
from . import ops

__all__ = ["sketch_grouped"]

_MOST = 1 << 62


def sketch_grouped(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    *,
    first_row: int = 0,
    row_step: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Add the sketches of the gradients ``G_s`` of a matrix whose rows are stacked groups (the experts of a mixture).

    Tokens are sorted by (group, segment), a token once for every group that it went to. Group g holds the matrix's rows
    ``first_row + g * row_step ..``, as many as ``d`` has columns::

        G_s[first_row + g * row_step + i, c] = sum_{t in (g, s)} d[t, i] a[t, c]

    All ranges are one call: no loop over groups, no padding, no gradient that exists. Groups may be missing tokens.
    Sketches of parts add up: a rank that holds some experts, or some rows of each, gives those alone.

    Args:
        d: output gradients [tokens, rows of a group].
        a: inputs [tokens, plan.cols], or already folded by `fold_inputs` [tokens, plan.folded_cols].
        offsets: int64 [groups * segments + 1] as of `sketch_linear`: tokens of group g in segment s are
            ``offsets[g * segments + s] .. offsets[g * segments + s + 1]``.
        plan: `plan_matrix` of the stacked matrix: [experts * rows, cols] for a fused parameter [experts, rows, cols].
        out: float32 [segments, plan.n_slabs * 32768], added to in place. float64 only on the reference.
        first_row: the matrix's row that the first column of ``d`` in group 0 belongs to.
        row_step: rows from one group to the next; None: the number of ``d``'s columns, groups lie side by side.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    The sums are float32 in an order that depends on the segment alone: equal bits for any thread count and for any
    neighbours in the batch. One group with ``first_row=0`` over the matrix is `sketch_linear`, on a CPU bit by bit.

    Raises:
        ValueError: shapes, dtypes or offsets are wrong; the groups' rows leave the matrix or overlap; ``plan`` folds
            its rows (a tied head); names which.
        RuntimeError: the backend that was named cannot serve the call; says why.
    """
    step = ops.step_of(d, row_step if row_step is None else check_int("row_step", row_step, -_MOST, _MOST))
    # Whether it fits the plan, the operator checks.
    first_row = check_int("first_row", first_row, -_MOST, _MOST)
    ops.SKETCH(plain(d), plain(a), offsets, out, recipe_of(plan), first_row, step, backend)
    return out
