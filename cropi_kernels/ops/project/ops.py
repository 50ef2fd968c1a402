"""Registration as PyTorch operators: schemas, shapes for tracing, kernels and the autograd formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import library

from ... import _cuda, _native, dispatch
from ..._library import LIB, NAMESPACE, register
from . import cpu
from .spec import KEEP_ALL, ProjectionSpec

_COPY, _DEVICE_COPY = 1 << 24, 1 << 26  # bytes copied at a time


def choose(x: torch.Tensor, spec: ProjectionSpec, backend: str | None, adjoint: bool = False) -> Any:
    """The module that serves the call. On the host the reference is never chosen for a caller: it is far slower."""
    wide = x.dtype == torch.float64 and x.device.type == "cpu" and not x.requires_grad
    if wide and dispatch.named(backend) == "cpu":
        _native.native()
        return cpu  # by name only: float64 is most often NumPy's default and not a wish, and costs more than float32
    by_name = {
        "remedy": "cast it (x.float()), or name backend='cpu', which sums it in float64 (for a projector or module, "
        "set CROPI_KERNELS_BACKEND=cpu in the environment)"
    }
    no_triton = None if spec.sparse else f"{spec.kind} projections have no Triton kernel"
    # On an H200, 1e9 coordinates: adjoints take 1.11 ms in Triton and 1.99 in CUDA C++, eight rows of an SJLT with four
    # nonzeros 12.8 and 15.1, of CountSketch with a tenth of the coordinates 7.0 and 12.5, with all 4.6 and 4.2.
    by_runs = spec.sparse and spec.group == 16
    triton_first = by_runs and (adjoint or spec.nnz > 1 or spec.keep_count < KEEP_ALL)
    name = dispatch.choose(
        "project",
        x,
        backend=backend,
        without={"cuda": _cuda.unsupported(x), "triton": no_triton},
        fallback=x.is_cuda and x.dtype != torch.float64,
        order=("triton", "cuda") if triton_first else ("cuda", "triton"),
        **(by_name if wide and not adjoint else {}),
    )
    return dispatch.kernels(__package__, name)


def contiguous_columns(x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first column, piece): ``x`` in pieces with contiguous columns, some megabytes each; whole where it has them."""
    if x.shape[1] <= 1 or x.stride(1) == 1:
        yield 0, x
        return
    most = _DEVICE_COPY if x.is_cuda else _COPY
    step = max(128, most // max(1, x.shape[0] * x.element_size()) // 128 * 128)
    for start in range(0, x.shape[1], step):
        yield start, x[:, start : start + step].contiguous()


def check_out(out: torch.Tensor, x: torch.Tensor, spec: ProjectionSpec) -> None:
    want = _dtype(x)
    if tuple(out.shape) != (x.shape[0], spec.dim) or out.dtype != want or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}, contiguous={out.is_contiguous()}: it must be contiguous {want} "
            f"[{x.shape[0]}, {spec.dim}]"
        )
    if out.device != x.device:
        raise ValueError(f"out is on {out.device} but x is on {x.device}")
    for name, tensor in (("x", x), ("out", out)):
        if tensor.requires_grad:
            raise ValueError(
                f"out cannot take part in autograd: pass {name}.detach(), or add the results of calls without out"
            )


def _dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _add(x: torch.Tensor, out: torch.Tensor, offset: int, spec: str, backend: str | None) -> None:
    _add_fake(x, out, offset, spec, backend)
    _accumulate(x, out, offset, ProjectionSpec.from_recipe(spec), backend)


def _add_fake(x: torch.Tensor, out: torch.Tensor, offset: int, spec: str, backend: str | None) -> None:
    check_out(out, x, ProjectionSpec.from_recipe(spec))


def _project(x: torch.Tensor, offset: int, spec: str, backend: str | None) -> torch.Tensor:
    plan = ProjectionSpec.from_recipe(spec)
    out = x.new_zeros(x.shape[0], plan.dim, dtype=_dtype(x))
    _accumulate(x, out, offset, plan, backend)
    return out


def _project_fake(x: torch.Tensor, offset: int, spec: str, backend: str | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], ProjectionSpec.from_recipe(spec).dim, dtype=_dtype(x))


def _accumulate(
    x: torch.Tensor, out: torch.Tensor, offset: int, spec: ProjectionSpec, backend: str | None
) -> None:
    """``out += S x``; rows of the result that are not finite become NaN throughout."""
    served_by = choose(x, spec, backend)
    for start, piece in contiguous_columns(x.detach()):
        served_by.project(piece, spec, out, offset + start)
    out.masked_fill_(~torch.isfinite(out).all(dim=1, keepdim=True), torch.nan)


def _transpose(y: torch.Tensor, n: int, offset: int, spec: str, backend: str | None) -> torch.Tensor:
    wide, plan = y.detach().to(_dtype(y)).contiguous(), ProjectionSpec.from_recipe(spec)
    out = wide.new_empty(y.shape[0], n)
    served_by = choose(wide, plan, backend, adjoint=True)
    if served_by is cpu and wide.dtype == torch.float64:
        raise RuntimeError(
            "backend='cpu' cannot run project_transpose: dtype torch.float64; name 'reference'"
        )
    served_by.transpose(wide, plan, out, offset)
    return out


def _transpose_fake(y: torch.Tensor, n: int, offset: int, spec: str, backend: str | None) -> torch.Tensor:
    return y.new_empty(y.shape[0], n, dtype=_dtype(y))


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.offset, ctx.spec, ctx.backend = inputs
    ctx.n, ctx.dtype = x.shape[1], x.dtype


def _grad_project(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    dx = torch.ops.cropi.project_transpose(grad, ctx.n, ctx.offset, ctx.spec, ctx.backend)
    return dx.to(ctx.dtype), None, None, None


def _save_transpose(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, _, ctx.offset, ctx.spec, ctx.backend = inputs
    ctx.dtype = y.dtype


def _grad_transpose(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    dy = torch.ops.cropi.project(grad, ctx.offset, ctx.spec, ctx.backend)
    return dy.to(ctx.dtype), None, None, None, None


REMEDY = "give fewer rows a call, or fewer columns at a time, each piece at its offset with the same out"
register(
    "project(Tensor x, int offset, str spec, str? backend) -> Tensor", _project, _project_fake, remedy=REMEDY
)
register(
    "project_add(Tensor x, Tensor(a!) out, int offset, str spec, str? backend) -> ()",
    _add, _add_fake, remedy=REMEDY,
)  # fmt: skip
register(
    "project_transpose(Tensor y, int n, int offset, str spec, str? backend) -> Tensor",
    _transpose, _transpose_fake, remedy=REMEDY,
)  # fmt: skip
library.register_autograd(f"{NAMESPACE}::project", _grad_project, setup_context=_save_project, lib=LIB)
library.register_autograd(
    f"{NAMESPACE}::project_transpose", _grad_transpose, setup_context=_save_transpose, lib=LIB
)
