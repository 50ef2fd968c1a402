"""CUDA kernels behind `project` and `project_transpose` (csrc/cuda/project_*.h)."""

from __future__ import annotations

import ctypes

import torch

from ... import _cuda, _gpu, _native
from .spec import ProjectionSpec


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T`` on the current stream of the tensors' device; rows of ``x`` may be strided."""
    _call(False, x, spec, out, offset)


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    _call(True, out, spec, y, offset)


def _call(adjoint: bool, x: torch.Tensor, spec: ProjectionSpec, y: torch.Tensor, offset: int) -> None:
    kernels = _cuda.kernels()
    call = _cuda.ProjectCall(
        x.data_ptr(), *x.shape, x.stride(0), offset, *spec.key, spec.dim, spec.nnz, spec.keep_count,
        _native.DTYPES[x.dtype], spec.kind == "gaussian", spec.scale, y.data_ptr(), y.stride(0),
    )  # fmt: skip
    dense = int(not spec.sparse)
    size = 0 if adjoint else kernels.cropi_project_workspace(ctypes.byref(call), dense)
    with _gpu.on(x):
        workspace = torch.empty(size // 4, dtype=torch.float32, device=x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        error = kernels.cropi_project(ctypes.byref(call), dense, int(adjoint), workspace.data_ptr(), stream)
    _cuda.check(kernels, error, "project")
