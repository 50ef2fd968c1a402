"""C++ kernels behind `project` and `project_transpose` (csrc/cpu/project_sparse.cpp, project_dense.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .spec import ProjectionSpec


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T``; rows of ``x`` may be strided."""
    _call(False, x, spec, out, offset)


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
