"""C++ kernel behind `sketch_embedding` (csrc/cpu/sketch_rows.cpp)."""

from __future__ import annotations

import numpy as np
import torch

from ... import _native
from ...plan import MatrixPlan


def sketch_rows(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """For ``x`` whose columns are folded where the plan folds them."""
    folded, scale = plan.fold_rows(rows.numpy())
    folded, scale = np.ascontiguousarray(folded, np.int64), np.ascontiguousarray(scale)
    x = _native.rows_view(x)
    _native.native().sketch_rows(
        _native.matrix(x),
        _native.address(folded),
        _native.address(scale),
        _native.slab_plan(plan, False),
        offsets.numel() - 1,
        _native.pointer(offsets),
        _native.pointer(out),
        out.stride(0),
        _native.threads(),
    )
