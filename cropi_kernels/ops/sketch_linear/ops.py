"""The operators ``cropi::fold_columns`` and ``cropi::sketch_linear``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from ...plan import MatrixPlan, matrix_plan_of
from .._checks import (
    check_devices,
    check_offset_values,
    check_offsets,
    check_operand,
    check_out,
    offsets_for,
)

REMEDY = "give fewer tokens a call (a smaller micro-batch), or fewer segments"


def check_unfolded(x: torch.Tensor, plan: MatrixPlan, rows: bool) -> None:
    if rows:
        check_operand("d", x, plan.rows, f"output gradients of {plan.name}")
    else:
        check_operand("a", x, plan.cols, f"inputs of {plan.name}")


def fold(x: torch.Tensor, plan: MatrixPlan, rows: bool, backend: str | None) -> torch.Tensor:
    """``x`` folded: output gradients of a tied head (``rows``), or inputs; itself where `plan` has no such fold."""
    check_unfolded(x, plan, rows)
    offset, sign, width = (
        (plan.row_fold, plan.row_sign, plan.folded_rows)
        if rows
        else (plan.col_fold, plan.col_sign, plan.folded_cols)
    )
    if offset is None:
        return x
    chosen = dispatch.choose("fold_columns", x, backend=backend)
    kernels, tables = dispatch.kernels(__package__, chosen), (sign, offset)
    if chosen == "triton":  # they are on the device already
        tables = kernels.fold_tables(plan, x.device, rows)
    folded: torch.Tensor = kernels.fold_columns(x, *tables, width)
    return folded


def _fold(x: torch.Tensor, plan: str, rows: bool, backend: str | None) -> torch.Tensor:
    folded = fold(x, matrix_plan_of(plan), rows, backend)
    return folded.clone() if folded is x else folded  # an operator's result is never its operand


def _fold_fake(x: torch.Tensor, plan: str, rows: bool, backend: str | None) -> torch.Tensor:
    made = matrix_plan_of(plan)
    check_unfolded(x, made, rows)
    return x.new_empty(x.shape[0], made.folded_rows if rows else made.folded_cols)


def _sketch(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, plan: str, backend: str | None
) -> None:
    _check(d, a, offsets, out, plan, backend)
    made = matrix_plan_of(plan)
    check_offset_values(offsets, d.shape[0])
    if d.shape[1] != made.folded_rows:
        d = fold(d, made, True, backend)
    if a.shape[1] != made.folded_cols:
        a = fold(a, made, False, backend)
    chosen = dispatch.choose("sketch_linear", d, a, out, backend=backend)
    kernels, offsets = dispatch.kernels(__package__, chosen), offsets_for(chosen, offsets, d)
    kernels.sketch_linear(d, a, offsets, made, out)


def _check(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, plan: str, backend: str | None
) -> None:
    made = matrix_plan_of(plan)
    rows = made.folded_rows
    check_operand("d", d, rows if d.shape[-1:] == (rows,) else made.rows, f"output gradients of {made.name}")
    check_inputs(d, a, made, out)
    check_out(out, check_offsets(offsets), made.dim)


def check_inputs(d: torch.Tensor, a: torch.Tensor, plan: MatrixPlan, out: torch.Tensor) -> None:
    """The inputs ``a`` of a layer, folded or not, beside its output gradients."""
    cols = plan.folded_cols
    check_operand("a", a, cols if a.shape[-1:] == (cols,) else plan.cols, f"inputs of {plan.name}")
    if d.shape[0] != a.shape[0]:
        raise ValueError(
            f"d has {d.shape[0]} tokens but a has {a.shape[0]}: they must come from the same forward"
        )
    check_devices("d", d, a=a, out=out)


FOLD = register(
    "fold_columns(Tensor x, str plan, bool rows, str? backend) -> Tensor", _fold, _fold_fake, remedy=REMEDY
)
SKETCH = register(
    "sketch_linear(Tensor d, Tensor a, Tensor offsets, Tensor(a!) out, str plan, str? backend) -> ()",
    _sketch, _check, remedy=REMEDY,
)  # fmt: skip
