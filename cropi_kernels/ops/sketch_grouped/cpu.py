"""C++ kernel behind `sketch_grouped`: the groups' ranges of csrc/cpu/sketch_linear.cpp."""

from __future__ import annotations

import torch

from ... import _native
from ...plan import MatrixPlan


def sketch_grouped(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    first_row: int,
    row_step: int,
) -> None:
    if out.shape[0] == 0:
        return
    d, a = _native.rows_view(d), _native.rows_view(a)
    _native.native().sketch_grouped(
        _native.matrix(d),
        _native.matrix(a),
        _native.slab_plan(plan, True),
        out.shape[0],
        _native.pointer(offsets),
        _native.pointer(out),
        out.stride(0),
        plan.n_slabs,
        _native.threads(),
        (offsets.numel() - 1) // out.shape[0],
        first_row,
        row_step,
    )
