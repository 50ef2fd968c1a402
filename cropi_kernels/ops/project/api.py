"""The public functions of `project`: they check their arguments and compute nothing."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch

from ... import _native
from ..._fork import one_thread_after_fork
from ..._level import level_of_caller
from ..._library import refuse_transforms
from ..._spec_base import as_int
from ...dispatch import checked
from .._checks import check_plain
from . import ops
from .spec import MAX_COORDINATE, ProjectionSpec

NonFinite = Literal["warn", "raise", "ignore"]


def project(
    x: torch.Tensor,
    spec: ProjectionSpec,
    offset: int = 0,
    *,
    out: torch.Tensor | None = None,
    nonfinite: NonFinite = "warn",
    backend: str | None = None,
) -> torch.Tensor:
    """``y[b] = sum_p x[b, p] S[:, offset + p]``: random projections of rows that exist, ``E <S x, S x'> = <x, x'>``.

    S is a function of ``spec`` and the coordinate alone: shards and chunks of a row, each at its own offset, add up to
    the projection of the whole. The sums are float32, in an order that depends on the sizes of the call: equal bits for
    any thread count and any other rows. Differentiable with respect to ``x`` (the gradient is `project_transpose`).

    >>> spec, x = ProjectionSpec(512, seed=1), torch.randn(2, 100_000)
    >>> y = project(x, spec)
    >>> shards = project(x[:, :60_000], spec) + project(x[:, 60_000:], spec, offset=60_000)
    >>> y.shape, torch.allclose(y, shards, atol=1e-3)
    (torch.Size([2, 512]), True)

    Args:
        x: float32, bfloat16 or float16 [B, P]; rows may be strided. Beyond input and output the memory stays under
            64 MB for dim up to 2^17, whatever B and P are (of ``"reference"``: some hundred MB and B rows of 2^20
            columns); strided columns are copied piece by piece.
        spec: what S is.
        offset: coordinate of the first column; ``offset + P`` may reach 2^62.
        out: contiguous float32 [B, dim] to add to, for streams of chunks; returned.
        nonfinite: a row that holds NaN or infinity (or overflows) comes out NaN throughout, all others right;
            ``"warn"`` names such rows in a RuntimeWarning, ``"raise"`` in an error, ``"ignore"`` says nothing, which
            alone is traced by ``torch.compile(fullgraph=True)``.
            Coordinates that ``keep`` drops are never looked at.
        backend: ``"cuda"`` (compiled CUDA C++), ``"triton"`` (sparse kinds on a GPU), ``"cpu"``, ``"reference"`` (plain
            torch, any device) or None for the first of them that can. The last two take float64 as well, where they
            are named; ``out`` and the result are float64 then.

    Raises:
        ValueError: names the argument, its value and the remedy.
        RuntimeError: no kernel serves the tensor's device or dtype; a derivative in forward mode or under `torch.func`
            is asked for; under `torch.func.vmap`: ``out``, or another ``nonfinite`` than ``"ignore"``.

    Sources: Charikar, Chen and Farach-Colton (2002); Kane and Nelson (2014) for sparse Johnson-Lindenstrauss maps.
    """
    _check_input("x", x, spec, "[B, P]")
    offset = check_range(offset, x.shape[1], spec)
    check_nonfinite(nonfinite)
    refuse_transforms("project", x=x, out=out)
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
        refused = "out" if out is not None else f"nonfinite={nonfinite!r}" if nonfinite != "ignore" else ""
        if refused:
            raise RuntimeError(
                f"{refused}: torch.func.vmap hides the numbers of x: project all rows [B, P] in one call without vmap, "
                "or give nonfinite='ignore' and no out"
            )
    if out is None:
        y, before = torch.ops.cropi.project(x, offset, spec.recipe, checked(backend)), None
    else:
        if not isinstance(out, torch.Tensor):
            raise ValueError(
                f"out is of type {type(out).__name__}: give a torch.Tensor (torch.as_tensor(out))"
            )
        check_plain("out", out)
        ops.check_out(out, x, spec)
        y, before = out, None if nonfinite == "ignore" else torch.isfinite(out).all(dim=1)
        torch.ops.cropi.project_add(x, out, offset, spec.recipe, checked(backend))
    if nonfinite != "ignore":
        failed = torch.isnan(y.detach()[:, 0])
        report(failed if before is None else failed & before, offset, nonfinite)
    return y


def project_transpose(
    y: torch.Tensor, spec: ProjectionSpec, n: int, offset: int = 0, *, backend: str | None = None
) -> torch.Tensor:
    """``x[b, p] = sum_c y[b, c] S[c, offset + p]`` for p < n: the adjoint, ``<S x, y> = <x, S^T y>``.

    Args:
        y: float32, bfloat16 or float16 [B, dim].
        n: coordinates of the result, float32 [B, n]; offset, spec and backend are those of `project`.

    Raises:
        ValueError: names the argument, its value and the remedy.
        RuntimeError: no kernel serves the tensor's device or dtype; a derivative in forward mode or under `torch.func`
            is asked for.

    >>> spec, x = ProjectionSpec(64), torch.randn(1, 500)
    >>> y = torch.randn(1, 64)
    >>> left, right = (project(x, spec) * y).sum(), (x * project_transpose(y, spec, 500)).sum()
    >>> torch.allclose(left, right, rtol=1e-3, atol=1e-3)
    True
    """
    _check_input("y", y, spec, "[B, dim]")
    if y.shape[1] != spec.dim:
        raise ValueError(
            f"y has shape {tuple(y.shape)}: the spec has dim={spec.dim}, so it must be [B, {spec.dim}]"
        )
    whole = as_int(n, 0)
    if whole is None:
        raise ValueError(f"n={n!r}: give the number of coordinates, an integer >= 0")
    offset = check_range(offset, whole, spec)
    refuse_transforms("project_transpose", y=y)
    result: torch.Tensor = torch.ops.cropi.project_transpose(y, whole, offset, spec.recipe, checked(backend))
    return result


def _check_input(name: str, x: torch.Tensor, spec: ProjectionSpec, shape: str) -> None:
    check_spec(spec)
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"{name} is of type {type(x).__name__}: give a torch.Tensor {shape} ({_as_tensor(x)})"
        )
    if x.layout != torch.strided and not x.is_nested:
        raise ValueError(
            f"{name} has the sparse layout {x.layout}: give a dense tensor (to_dense()), or use cropi.sklearn for "
            "scipy matrices"
        )
    if not _native.pending(x):
        check_plain(name, x)
    if x.ndim != 2:
        hint = f"; {name}[None] for one row" if x.ndim == 1 else "; flatten the parameters of a row first"
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {shape}{hint}")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise ValueError(f"{name} is {x.dtype}: give float32, bfloat16 or float16")


def _as_tensor(x: Any) -> str:
    if isinstance(x, (dict, list, tuple)):
        return (
            "join parts by torch.cat([g.flatten(1) for g in grads], 1), or add up project(part, spec, offset)"
        )
    return "torch.from_numpy for arrays"


def check_spec(spec: ProjectionSpec) -> None:
    one_thread_after_fork()  # the operators ask too, but what public functions look at may be large as well
    if not isinstance(spec, ProjectionSpec):
        raise ValueError(f"spec is of type {type(spec).__name__}: give a cropi_kernels.ProjectionSpec")


def check_nonfinite(nonfinite: str) -> None:
    if nonfinite not in ("warn", "raise", "ignore"):
        raise ValueError(f"nonfinite={nonfinite!r}: choose warn, raise or ignore")


def check_range(offset: int, n: int, spec: ProjectionSpec) -> int:
    """``offset`` as a Python integer."""
    whole = as_int(offset, 0)
    if whole is None:
        raise ValueError(f"offset={offset!r}: give the coordinate of the first column, an integer >= 0")
    offset = whole
    if offset + n > MAX_COORDINATE:
        raise ValueError(f"offset={offset} with {n} columns: coordinates must stay below 2^62")
    if spec.size is not None and offset + n > spec.size:
        raise ValueError(
            f"columns {offset} .. {offset + n} do not fit: the spec has size={spec.size} coordinates; was the model's "
            "set of parameters changed?"
        )
    return offset


def report(failed: torch.Tensor, offset: int, nonfinite: NonFinite) -> None:
    """Names the rows whose projections are NaN, for the public function that asks; on meta there are no numbers."""
    if failed.is_meta:
        return
    rows = failed.nonzero()[:, 0].tolist()
    if not rows:
        return
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    which = f"{len(rows)} row(s) of x hold NaN or infinity (chunk at offset {offset}): {shown}"
    message = f"{which}; their projections are NaN"
    if nonfinite == "raise":
        raise ValueError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=level_of_caller())
