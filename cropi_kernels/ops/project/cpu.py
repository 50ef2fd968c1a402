"""C++ kernels behind `project` and `project_transpose` (csrc/cpu/project_sparse.cpp, project_dense.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .spec import ProjectionSpec

_COPY = 1 << 24  # elements copied at a time where columns are strided


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T``; rows of ``x`` may be strided, strided columns are copied a few megabytes at a time."""
    if x.shape[1] <= 1 or x.stride(1) == 1:
        _call(False, x, spec, out, offset)
        return
    step = max(128, _COPY // max(1, x.shape[0] * x.element_size()))
    for start in range(0, x.shape[1], step):
        _call(False, x[:, start : start + step].contiguous(), spec, out, offset + start)


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    _call(True, out, spec, y, offset)


def _call(adjoint: bool, x: torch.Tensor, spec: ProjectionSpec, y: torch.Tensor, offset: int) -> None:
    family = "sparse" if spec.sparse else spec.kind
    _native.native().project(
        family,
        adjoint,
        _native.matrix(x),
        offset,
        *spec.key,
        spec.dim,
        spec.nnz,
        spec.keep_count,
        spec.scale,
        y.data_ptr(),
        y.stride(0),
        _native.threads(),
    )
