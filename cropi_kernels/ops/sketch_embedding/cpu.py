"""C++ kernel behind `sketch_embedding` (csrc/cpu/sketch_embedding.cpp)."""

from __future__ import annotations

import numpy as np
import torch

from ... import _native
from ...plan import MatrixPlan


def sketch_embedding(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """For ``x`` whose columns are folded where the plan folds them."""
    folded, sign = plan.fold_rows(rows.numpy())
    folded, sign = np.ascontiguousarray(folded, np.int64), np.ascontiguousarray(sign)
    x = _native.rows_view(x)
    _native.native().sketch_embedding(
        _native.matrix(x),
        _native.address(folded),
        _native.address(sign),
        _native.slab_plan(plan, False),
        offsets.numel() - 1,
        _native.pointer(offsets),
        _native.pointer(out),
        out.stride(0),
        _native.threads(),
    )
