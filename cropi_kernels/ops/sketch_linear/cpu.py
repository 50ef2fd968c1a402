"""C++ kernels behind `fold_columns` and `sketch_linear` (csrc/cpu/fold_columns.cpp, sketch_linear.cpp)."""

from __future__ import annotations

import numpy as np
import torch

from ... import _native
from ...plan import MatrixPlan


def fold_columns(x: torch.Tensor, sign: np.ndarray, offset: np.ndarray, width: int) -> torch.Tensor:
    x = _native.rows_view(x)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device="cpu")
    _native.native().fold_columns(
        _native.matrix(x),
        _native.pointer(out),
        width,
        _native.address(offset),
        _native.address(sign),
        _native.threads(),
    )
    return out


def sketch_linear(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    d, a = _native.rows_view(d), _native.rows_view(a)
    _native.native().sketch_linear(
        _native.matrix(d),
        _native.matrix(a),
        _native.slab_plan(plan, True),
        offsets.numel() - 1,
        _native.pointer(offsets),
        _native.pointer(out),
        out.stride(0),
        plan.n_slabs,
        _native.threads(),
    )
