"""Projections of sparse rows by the sparse kinds: the cost is that of the numbers that are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ... import _native, dispatch
from ..._library import register
from ..._spec_base import as_int
from ...adding import add_rows
from .._checks import check_plain
from . import reference
from .api import NonFinite, check_nonfinite, check_range, check_spec, report
from .spec import ProjectionSpec

_INDEX = (torch.int32, torch.int64)


class CsrRows(NamedTuple):
    """Row b has ``values[k]`` in column ``columns[k]`` for k from ``starts[b]`` to ``starts[b + 1]``, in any order.

    >>> rows = CsrRows(torch.tensor([0, 1, 2]), torch.tensor([3, 0]), torch.tensor([1.0, -2.0]), 8)
    >>> project_csr(rows, ProjectionSpec(64)).norm(dim=1)
    tensor([1., 2.])
    """

    starts: torch.Tensor  # int32 or int64 [B + 1]
    columns: torch.Tensor  # of the same dtype [n]
    values: torch.Tensor  # float32 or float64 [n]
    width: int  # columns of the matrix


def project_csr(
    x: CsrRows,
    spec: ProjectionSpec,
    offset: int = 0,
    *,
    nonfinite: NonFinite = "warn",
    backend: str | None = None,
) -> torch.Tensor:
    """`project` of sparse rows: [B, dim] in the dtype of the values, with the buckets and signs of the dense rows.

    The cost is that of the stored numbers and of the result. Each row is summed in the order in which it is stored, in
    the dtype of its values: equal bits for any thread count and any other rows. Not differentiable.

    >>> x = CsrRows(torch.tensor([0, 2, 3]), torch.tensor([5, 70, 5]), torch.tensor([1.0, 2.0, 3.0]), 100)
    >>> dense = torch.zeros(2, 100)
    >>> dense[0, 5], dense[0, 70], dense[1, 5] = 1.0, 2.0, 3.0
    >>> spec = ProjectionSpec(16)
    >>> torch.equal(project_csr(x, spec), project(dense, spec))
    True

    Args:
        x: the rows, on the CPU; a column that is stored twice counts twice.
        spec: of kind ``countsketch`` or ``sjlt``.
        offset: coordinate of column 0.
        nonfinite: as in `project`.
        backend: ``"cpu"``, ``"reference"`` or None for the first of them.

    Raises:
        ValueError: names the argument, its value and the remedy.
        RuntimeError: no kernel serves the tensors' device.
    """
    offset = _check(x, spec, offset, nonfinite)
    y: torch.Tensor = torch.ops.cropi.project_csr(
        *x[:3], x.width, offset, spec.recipe, dispatch.checked(backend)
    )
    if nonfinite != "ignore":
        report(torch.isnan(y[:, 0]), offset, nonfinite)
    return y


def project_csr_sparse(
    x: CsrRows,
    spec: ProjectionSpec,
    offset: int = 0,
    *,
    nonfinite: NonFinite = "warn",
    backend: str | None = None,
) -> CsrRows:
    """`project_csr` with a sparse result: the buckets that a row's numbers meet, and their sums, zeros included.

    For results that are wide beside the stored numbers of a row; a full result takes twice the memory of a dense one.
    Arguments and errors are those of `project_csr`. The columns of a row are in no particular order; they and the
    starts have the dtype of those of ``x``, from 2^31 numbers on int64.
    """
    offset = _check(x, spec, offset, nonfinite)
    bucket, y, count = torch.ops.cropi.project_csr_entries(
        *x[:3], x.width, offset, spec.recipe, dispatch.checked(backend)
    )
    starts = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    total = int(starts[-1])
    y = y[:total]
    if nonfinite != "ignore" and total:
        first = starts[:-1].clamp(max=total - 1)
        report(torch.isnan(y[first]) & (count > 0), offset, nonfinite)
    index = x.starts.dtype if total < 1 << 31 else torch.int64
    return CsrRows(starts.to(index), bucket[:total].to(index), y, spec.dim)


def _check(x: CsrRows, spec: ProjectionSpec, offset: int, nonfinite: str) -> int:
    check_spec(spec)
    if not spec.sparse:
        raise ValueError(
            f"kind={spec.kind!r} has no kernel for sparse rows: give dense rows, some columns at a time"
        )
    check_nonfinite(nonfinite)
    if as_int(x.width, 0) is None:
        raise ValueError(f"x.width={x.width!r}: give the number of the matrix's columns, an integer >= 0")
    offset = check_range(offset, x.width, spec)
    for name, tensor, dtypes in (
        ("starts", x.starts, _INDEX),
        ("columns", x.columns, _INDEX),
        ("values", x.values, (torch.float32, torch.float64)),
    ):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or tensor.dtype not in dtypes:
            raise ValueError(
                f"x.{name} is {_seen(tensor)}: give a 1-D tensor of {' or '.join(map(str, dtypes))}"
            )
        check_plain(f"x.{name}", tensor)
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"x.{name} is on {tensor.device}: sparse rows are projected on the CPU (x.cpu())"
            )
    if x.starts.dtype != x.columns.dtype:
        raise ValueError(f"x.starts is {x.starts.dtype}, x.columns {x.columns.dtype}: give both in one dtype")
    if len(x.columns) != len(x.values):
        raise ValueError(f"x has {len(x.columns)} columns for {len(x.values)} values: give one for each")
    if x.starts.numel() < 1 or int(x.starts[0]) != 0 or int(x.starts[-1]) != len(x.values):
        raise ValueError(f"x.starts must run from 0 to the number of values, {len(x.values)}")
    if bool((x.starts[1:] < x.starts[:-1]).any()):
        raise ValueError("x.starts must not run backwards")
    if len(x.columns):
        least, most = (int(v) for v in torch.aminmax(x.columns))
        if least < 0 or most >= x.width:
            raise ValueError(
                f"x.columns run from {least} to {most}: they must be from 0 to width - 1 = {x.width - 1}"
            )
    return offset


def _seen(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


# ------------------------------------------------------------------------------------------------------- operators
def _given(
    starts: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    n: int,
    offset: int,
    spec: str,
    backend: str | None,
) -> tuple[CsrRows, ProjectionSpec, int, str | None]:
    """The arguments of both operators."""
    return CsrRows(starts, columns, values, n), ProjectionSpec.from_recipe(spec), offset, backend


def _dense(*args: Any) -> torch.Tensor:
    x, plan, offset, backend = _given(*args)
    y = x.values.new_empty(len(x.starts) - 1, plan.dim)
    if _served_by_reference(x, backend):
        row, bucket, value = _pairs(x, plan, offset)
        y.zero_().index_put_((row, bucket), value, accumulate=True)
        return y.masked_fill_(~torch.isfinite(y).all(dim=1, keepdim=True), torch.nan)
    _native_call(x, plan, offset, y, None, None)
    return y


def _entries(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, plan, offset, backend = _given(*args)
    values, rows, most = x.values, len(x.starts) - 1, len(x.values) * plan.nnz
    y, count = values.new_empty(most), torch.zeros(rows, dtype=torch.int64, device=values.device)
    bucket = torch.empty(most, dtype=torch.int32, device=values.device)
    if not _served_by_reference(x, backend):
        _native_call(x, plan, offset, y, bucket, count)
        return bucket, y, count
    row, at, value = _pairs(x, plan, offset)
    cells, where = torch.unique(row * plan.dim + at, return_inverse=True)
    sums = add_rows(values.new_zeros(len(cells)), where, value)
    row_of = cells // plan.dim
    bad = torch.zeros(rows, dtype=torch.bool, device=values.device).index_fill_(
        0, row_of[~torch.isfinite(sums)], True
    )
    count += torch.bincount(row_of, minlength=rows)
    n = len(cells)
    bucket[:n], y[:n] = (cells % plan.dim).int(), sums.masked_fill(bad[row_of], torch.nan)
    return bucket, y, count


def _served_by_reference(x: CsrRows, backend: str | None) -> bool:
    # The kernel serves every dtype of values: it sums float64 too.
    name = dispatch.choose(
        "project_csr", torch.empty(0, dtype=torch.float32, device=x.values.device), backend=backend,
        without={"triton": "sparse rows have no Triton kernel"},
    )  # fmt: skip
    return name == "reference"


def _pairs(x: CsrRows, spec: ProjectionSpec, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, bucket, signed and scaled value) of every number that is kept, from the definition."""
    p, place = np.unique(x.columns.numpy(), return_inverse=True)
    bucket, sign = reference.coordinates(spec, p.astype(np.uint64) + np.uint64(offset))
    row = torch.repeat_interleave(
        torch.arange(len(x.starts) - 1, device=x.starts.device), x.starts.diff().long()
    )
    at, signs = torch.from_numpy(bucket[:, place]), torch.from_numpy(sign[:, place]).to(x.values.dtype)
    kept = signs != 0
    value = (signs * spec.scale * x.values.where(kept, torch.zeros_like(x.values)))[kept]
    return row.expand(spec.nnz, -1)[kept], at[kept], value


def _native_call(
    x: CsrRows,
    spec: ProjectionSpec,
    offset: int,
    y: torch.Tensor,
    bucket: torch.Tensor | None,
    count: torch.Tensor | None,
) -> None:
    starts, columns, values = (t.contiguous() for t in x[:3])
    _native.native().project_csr(
        _native.pointer(values),
        _native.pointer(columns),
        _native.pointer(starts),
        values.dtype == torch.float64,
        columns.dtype == torch.int64,
        len(starts) - 1,
        x.width,
        len(values),
        0,
        offset,
        *spec.key,
        spec.dim,
        spec.nnz,
        spec.keep_count,
        spec.scale,
        _native.pointer(y),
        0 if bucket is None else _native.pointer(bucket),
        0 if count is None else _native.pointer(count),
        _native.threads(),
    )


def _dense_fake(*args: Any) -> torch.Tensor:
    x, plan, *_ = _given(*args)
    return x.values.new_empty(x.starts.shape[0] - 1, plan.dim)


def _entries_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, plan, *_ = _given(*args)
    new, most = x.values.new_empty, x.values.shape[0] * plan.nnz
    return new(most, dtype=torch.int32), new(most), new(x.starts.shape[0] - 1, dtype=torch.int64)


_ARGUMENTS = "Tensor starts, Tensor columns, Tensor values, int n, int offset, str spec, str? backend"
_REMEDY = "give fewer rows a call"
register(f"project_csr({_ARGUMENTS}) -> Tensor", _dense, _dense_fake, remedy=_REMEDY)
register(
    f"project_csr_entries({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _entries, _entries_fake, remedy=_REMEDY
)
