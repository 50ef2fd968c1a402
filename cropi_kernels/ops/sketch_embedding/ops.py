"""The operator ``cropi::sketch_embedding``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from ...plan import matrix_plan_of
from .._checks import (
    check_devices,
    check_offset_values,
    check_offsets,
    check_operand,
    check_out,
    check_plain,
    offsets_for,
)
from ..sketch_linear.ops import REMEDY, fold


def _sketch(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    plan: str,
    backend: str | None,
) -> None:
    _check(x, rows, offsets, out, plan, backend)
    made = matrix_plan_of(plan)
    # Reading ids from a device would make the host wait: there, one that is out of range makes its segment NaN.
    if rows.numel() and not rows.is_cuda and not 0 <= int(rows.min()) <= int(rows.max()) < made.rows:
        raise ValueError(
            f"rows runs from {int(rows.min())} to {int(rows.max())}: {made.name} has rows 0 .. {made.rows - 1}"
        )
    check_offset_values(offsets, x.shape[0])
    chosen = dispatch.choose("sketch_embedding", x, out, backend=backend)
    kernels, offsets = dispatch.kernels(__package__, chosen), offsets_for(chosen, offsets, x)
    if chosen != "reference":
        x = fold(x, made, False, backend)
    kernels.sketch_embedding(x, rows, offsets, made, out)


def _check(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    plan: str,
    backend: str | None,
) -> None:
    made = matrix_plan_of(plan)
    check_operand("x", x, made.cols, f"gradients of {made.name}")
    if rows.ndim != 1 or rows.shape[0] != x.shape[0] or rows.dtype != torch.int64:
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}: it must be int64 [{x.shape[0]}], a row per token"
        )
    check_plain("rows", rows)
    check_devices("x", x, rows=rows, out=out)
    check_out(out, check_offsets(offsets), made.dim)


SKETCH = register(
    "sketch_embedding(Tensor x, Tensor rows, Tensor offsets, Tensor(a!) out, str plan, str? backend) -> ()",
    _sketch, _check, remedy=REMEDY,
)  # fmt: skip
