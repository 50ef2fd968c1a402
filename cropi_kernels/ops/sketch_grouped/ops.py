"""The operator ``cropi::sketch_grouped``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from ...plan import matrix_plan_of
from .._checks import check_floating, check_offset_values, check_offsets, check_out, offsets_for
from ..sketch_linear.ops import REMEDY, check_inputs, fold


def step_of(d: torch.Tensor, row_step: int | None) -> int:
    if d.ndim != 2 or d.shape[1] < 1:
        raise ValueError(
            f"d has shape {tuple(d.shape)}: it must be [tokens, rows of a group], at least one row"
        )
    return d.shape[1] if row_step is None else row_step


def _sketch(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    plan: str,
    first_row: int,
    row_step: int,
    backend: str | None,
) -> None:
    _check(d, a, offsets, out, plan, first_row, row_step, backend)
    made = matrix_plan_of(plan)
    check_offset_values(offsets, d.shape[0])
    if a.shape[1] != made.folded_cols:
        a = fold(a, made, False, backend)
    chosen = dispatch.choose("sketch_grouped", d, a, out, backend=backend)
    kernels, offsets = dispatch.kernels(__package__, chosen), offsets_for(chosen, offsets, d)
    kernels.sketch_grouped(d, a, offsets, made, out, first_row, row_step)


def _check(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    plan: str,
    first_row: int,
    row_step: int,
    backend: str | None,
) -> None:
    made = matrix_plan_of(plan)
    if made.row_fold is not None:
        raise ValueError(
            f"the plan of {made.name} folds its rows (role='tied'): groups of rows exist before a fold only, give a "
            "plan with role='linear'"
        )
    step_of(d, row_step)
    check_floating("d", d)
    check_inputs(d, a, made, out)
    ranges, segments = check_offsets(offsets), out.shape[0] if out.ndim == 2 else 0
    if ranges % max(segments, 1) or (ranges and not segments):
        raise ValueError(
            f"offsets holds {ranges} ranges for out's {segments} segments: give groups * segments + 1 offsets"
        )
    check_out(out, segments, made.dim)
    groups = ranges // segments if segments else 0
    rows, last = d.shape[1], first_row + (groups - 1) * row_step + d.shape[1]
    if first_row < 0 or (groups and last > made.rows) or (groups > 1 and row_step < rows):
        raise ValueError(
            f"first_row={first_row}, row_step={row_step}: {groups} groups of {rows} rows must lie side by side in the "
            f"{made.rows} rows of {made.name}"
        )


SKETCH = register(
    "sketch_grouped(Tensor d, Tensor a, Tensor offsets, Tensor(a!) out, str plan, int first_row, int row_step, "
    "str? backend) -> ()",
    _sketch, _check, remedy=REMEDY,
)  # fmt: skip
