"""C++ kernels behind `project` and `project_transpose` (csrc/cpu/project_sparse.cpp, project_dense.cpp).

Rows of float64 are served where the caller names this backend, and summed in float64: the sparse kinds by
csrc/cpu/project_csr.cpp, the dense ones by products with entries that the kernel draws in float32.
"""

from __future__ import annotations

import numpy as np
import torch

from ... import _native
from .reference import kept_coordinates
from .spec import KEEP_ALL, ProjectionSpec

_ENTRIES = 1 << 22  # entries of a dense S that are held at a time
_AT_ONCE = 32  # columns that are drawn in a call: as rows of the identity, which share their draws


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T``; rows of ``x`` may be strided."""
    if x.dtype != torch.float64:
        _call(False, x, spec, out, offset, spec.scale)
    elif spec.sparse:
        _double_sparse(x, spec, out, offset)
    else:
        _double_dense(x, spec, out, offset)


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    _call(True, out, spec, y, offset, spec.scale)


def entries(spec: ProjectionSpec, offset: int, n: int) -> torch.Tensor:
    """float32 [n, dim]: columns offset .. offset + n of a dense S, not scaled."""
    block = torch.zeros(n, spec.dim, dtype=torch.float32, device="cpu")
    eye = torch.eye(min(n, _AT_ONCE), dtype=torch.float32, device="cpu")
    for start in range(0, n, _AT_ONCE):
        m = min(_AT_ONCE, n - start)
        _call(False, eye[:m, :m], spec, block[start : start + m], offset + start, 1.0)
    return block


def _double_dense(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    step = max(_AT_ONCE, _ENTRIES // spec.dim)
    for start in range(0, x.shape[1], step):
        piece = x[:, start : start + step]
        if spec.keep_count < KEEP_ALL:  # 0 * NaN would be NaN
            p = np.arange(piece.shape[1], dtype=np.uint64) + np.uint64(offset + start)
            piece = piece.where(torch.from_numpy(kept_coordinates(spec, p)), torch.zeros_like(piece))
        out.addmm_(piece, entries(spec, offset + start, piece.shape[1]).double(), alpha=spec.scale)


def _double_sparse(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    _native.native().project_csr(
        _native.pointer(x), 0, 0, True, True, *x.shape, 0, x.stride(0), offset, *spec.key, spec.dim, spec.nnz,
        spec.keep_count, spec.scale, _native.pointer(out), 0, 0, _native.threads(),
    )  # fmt: skip


def _call(
    adjoint: bool, x: torch.Tensor, spec: ProjectionSpec, y: torch.Tensor, offset: int, scale: float
) -> None:
    _native.native().project(
        spec.sparse,
        spec.kind == "gaussian",
        adjoint,
        _native.matrix(x),
        offset,
        *spec.key,
        spec.dim,
        spec.nnz,
        spec.keep_count,
        scale,
        _native.pointer(y),
        y.stride(0),
        _native.threads(),
    )
