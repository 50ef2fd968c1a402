"""C++ kernel behind `sketch_vector` (csrc/cpu/sketch_vector.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from ...plan import VectorPlan


def sketch_vector(gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor) -> None:
    gradient = _native.rows_view(gradient.to(torch.float32))
    _native.native().sketch_vector(
        _native.pointer(gradient),
        gradient.shape[0],
        plan.size,
        gradient.stride(0),
        *_native.vector_plan(plan),
        _native.pointer(out),
        out.stride(0),
    )
