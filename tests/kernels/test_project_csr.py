"""Projections of sparse rows: the integers of the dense rows, sums of right value, equal bits, errors by name."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import library

from cropi_kernels import CsrRows, ProjectionSpec, project, project_csr, project_csr_sparse
from cropi_kernels import _native as native_module
from cropi_kernels.ops.project import reference
from cropi_kernels.projectors import BasicProjector

SPECS = [
    ProjectionSpec(64),
    ProjectionSpec(100, seed=3),
    ProjectionSpec(7),
    ProjectionSpec(1),
    ProjectionSpec(96, kind="sjlt", nnz=3),
    ProjectionSpec(60, kind="sjlt", nnz=4, keep=0.3),
    ProjectionSpec(256, keep=0.75, stream=2),
]
LEVELS = sorted(
    {1, 3, native_module.native().detected_level()} & set(range(native_module.native().detected_level() + 1))
)


def made(
    rows: int, width: int, per_row: int, dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int32
) -> CsrRows:
    """Rows of unequal length (some empty), columns in any order, some twice."""
    g = torch.Generator().manual_seed(rows + width)
    counts = torch.randint(0, 2 * per_row + 1, (rows,), generator=g)
    counts[rows // 2] = 0
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    n = int(starts[-1])
    columns = torch.randint(0, width, (n,), generator=g)
    return CsrRows(starts.to(index), columns.to(index), torch.randn(n, generator=g).to(dtype), width)


def dense(x: CsrRows) -> torch.Tensor:
    row = torch.repeat_interleave(torch.arange(len(x.starts) - 1), x.starts.diff().long())
    out = torch.zeros(len(x.starts) - 1, x.width, dtype=torch.float64)
    return out.index_put_((row, x.columns.long()), x.values.double(), accumulate=True)


def exact(x: CsrRows, spec: ProjectionSpec, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(S x in float64, sum of the magnitudes that meet a number)."""
    s = torch.from_numpy(reference.matrix(spec, offset, x.width))
    return dense(x) @ s, dense(x._replace(values=x.values.abs())) @ s.abs()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_row,width", [(40, 900), (3, 20_000)], ids=["table of draws", "draws by value"])
def test_right_value(spec: ProjectionSpec, dtype: torch.dtype, per_row: int, width: int) -> None:
    for index, offset in ((torch.int32, 0), (torch.int64, 12_345_678_901)):
        x = made(9, width, per_row, dtype, index)
        want, magnitude = exact(x, spec, offset)
        terms = int(x.starts.diff().max()) + 2
        for backend in ("cpu", "reference"):
            y = project_csr(x, spec, offset, backend=backend)
            assert y.dtype == dtype
            assert ((y.double() - want).abs() <= terms * torch.finfo(dtype).eps * magnitude + 1e-300).all()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_integers_are_those_of_dense_rows(spec: ProjectionSpec) -> None:
    """One number a row: what comes out is its bucket and its sign, whichever way it was drawn."""
    columns = torch.tensor([0, 1, 6, 7, 127, 128, 500, 999], dtype=torch.int32)
    x = CsrRows(torch.arange(9, dtype=torch.int32), columns, torch.arange(1.0, 9.0), 1000)
    many = CsrRows(torch.tensor([*range(9), 5008], dtype=torch.int32), torch.cat([columns, columns.repeat(625)]),
                   torch.cat([x.values, torch.zeros(5000)]), 1000)  # fmt: skip
    want = project(dense(x).float(), spec)
    assert torch.equal(project_csr(x, spec), want)
    assert torch.equal(project_csr(many, spec)[:8], want)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_result_is_the_dense_one(spec: ProjectionSpec, dtype: torch.dtype) -> None:
    x = made(12, 800, 30, dtype)
    want = project_csr(x, spec)
    for backend in ("cpu", "reference"):
        y = project_csr_sparse(x, spec, backend=backend)
        assert y.columns.dtype == torch.int32 and y.starts.dtype == torch.int32 and y.width == spec.dim
        long = project_csr_sparse(
            x._replace(starts=x.starts.long(), columns=x.columns.long()), spec, backend=backend
        )
        assert long.columns.dtype == torch.int64 and long.starts.dtype == torch.int64
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(y[:3], long[:3]))
        cells = torch.repeat_interleave(torch.arange(12), y.starts.diff().long()) * spec.dim + y.columns
        assert len(torch.unique(cells)) == len(cells), "a bucket comes once a row"
        back = dense(y).to(dtype)
        if backend == "cpu":
            assert torch.equal(back, want)
        torch.testing.assert_close(back, want)


@pytest.mark.parametrize("per_row,width", [(40, 900), (3, 20_000)], ids=["table of draws", "draws by value"])
@pytest.mark.parametrize("spec", SPECS[1::2], ids=repr)
def test_equal_bits_for_threads_levels_and_other_rows(spec: ProjectionSpec, per_row: int, width: int) -> None:
    c, threads = native_module.native(), torch.get_num_threads()
    x = made(700, width, per_row)
    want, entries = project_csr(x, spec), project_csr_sparse(x, spec)
    try:
        for level in LEVELS:
            c.set_level(level)
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(project_csr(x, spec), want)
                assert all(torch.equal(a, b) for a, b in zip(project_csr_sparse(x, spec)[:3], entries[:3]))
    finally:
        c.set_level(c.detected_level())
        torch.set_num_threads(threads)
    a, b = int(x.starts[100]), int(x.starts[107])
    few = CsrRows(x.starts[100:108] - a, x.columns[a:b], x.values[a:b], width)
    assert torch.equal(project_csr(few, spec), want[100:107])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_marks_its_row(bad: float) -> None:
    x, spec = made(9, 900, 20), ProjectionSpec(64, kind="sjlt", nnz=2)
    x.values[int(x.starts[3])] = bad
    want = project_csr(made(9, 900, 20), spec)
    with pytest.warns(
        RuntimeWarning, match=r"1 row\(s\) of x hold NaN or infinity .*: 3; their projections are NaN"
    ):
        y = project_csr(x, spec)
    assert torch.isnan(y[3]).all() and torch.equal(y[[0, 1, 2, 4]], want[[0, 1, 2, 4]])
    with pytest.raises(ValueError, match=r"1 row\(s\) of x .*: 3"):
        project_csr_sparse(x, spec, nonfinite="raise")
    entries = project_csr_sparse(x, spec, nonfinite="ignore")
    assert torch.isnan(entries.values[int(entries.starts[3]) : int(entries.starts[4])]).all()
    assert torch.isfinite(entries.values[: int(entries.starts[3])]).all()


def test_sums_that_overflow_are_named_and_dropped_numbers_are_not_read() -> None:
    spec = ProjectionSpec(1)
    sign = project_csr(CsrRows(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2), 2), spec)[:, 0]
    x = CsrRows(torch.tensor([0, 2]), torch.tensor([0, 1]), 3e38 * sign, 2)
    with pytest.warns(RuntimeWarning, match=r"row\(s\) of x .*: 0"):
        assert torch.isnan(project_csr(x, spec)).all()
    assert torch.isfinite(project_csr(x._replace(values=x.values.double()), spec)).all()
    half = ProjectionSpec(16, keep=0.5)
    kept = reference.kept_coordinates(half, np.arange(100, dtype=np.uint64))
    values = torch.where(torch.from_numpy(kept), 1.0, torch.nan)
    for backend in ("cpu", "reference"):
        y = project_csr(
            CsrRows(torch.tensor([0, 100]), torch.arange(100), values, 100), half, backend=backend
        )
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("kind,nnz", [("countsketch", 1), ("sjlt", 4), ("rademacher", 1), ("gaussian", 1)])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_float64_rows_are_summed_in_float64_where_the_backend_is_named(
    kind: Any, nnz: int, keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 3000, generator=g, dtype=torch.float64) * 1e60
    for dim, offset in ((64, 0), (100, 777)):
        spec = ProjectionSpec(dim, kind=kind, nnz=nnz, keep=keep)
        y = project(x, spec, offset, backend="cpu")
        want = project(x, spec, offset, backend="reference")
        # Gaussian entries are drawn in float32, Rademacher's and the sparse kinds' are exact.
        eps = 2.0**-22 if kind == "gaussian" else 3000 * 2.0**-52
        s = torch.from_numpy(reference.matrix(spec, offset, 3000)).abs()
        assert y.dtype == torch.float64 and ((y - want).abs() <= eps * (x.abs() @ s)).all()
        pieces = torch.zeros(3, dim, dtype=torch.float64)
        for start in range(0, 3000, 1100):
            project(x[:, start : start + 1100], spec, offset + start, out=pieces, backend="cpu")
        assert ((pieces - want).abs() <= eps * (x.abs() @ s)).all()
    with pytest.raises(RuntimeError, match="dtype torch.float64 .*or name backend='cpu'"):
        project(x, spec)
    # Projectors take no backend: there the environment names it.
    projector = BasicProjector(3000, dim, 0, kind if kind != "gaussian" else "normal", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="CROPI_KERNELS_BACKEND=cpu"):
        projector.project(x, 0)
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "cpu")
    want = project(x, projector.spec(0), backend="cpu") * dim**0.5
    assert torch.equal(projector.project(x, 0), want)


@pytest.mark.parametrize("dim", [250, 252, 248, 1000, 514, 4100])
def test_narrow_groups_sum_as_wide_ones(dim: int) -> None:
    """Dims that are not a multiple of 16, at any offset, dtype and level, with and without dropout: the right sums."""
    c = native_module.native()
    for keep, offset in itertools.product((1.0, 0.6), (0, 3, 100_001)):
        spec = ProjectionSpec(dim, keep=keep)
        # Once for the three dtypes: it takes longer than all that is tried.
        s = torch.from_numpy(reference.matrix(spec, offset, 9001)).abs()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 9001, generator=torch.Generator().manual_seed(dim)).to(dtype)
            want = project(x.float(), spec, offset, backend="reference")
            seen = []
            for level in LEVELS:
                c.set_level(level)
                try:
                    seen.append(project(x, spec, offset))
                finally:
                    c.set_level(c.detected_level())
            assert all(torch.equal(y, seen[0]) for y in seen)
            bound = 2 * 2.0**-23 * (9001 / dim + 8) * (x.double().abs() @ s)
            assert ((seen[0].double() - want.double()).abs() <= bound).all()


def test_wide_sparse_results_are_right_for_any_number_of_threads() -> None:
    """There a task has as many rows as the threads leave it, and clears its sums between them."""
    x, spec, threads = made(60, 20_000, 3), ProjectionSpec(1 << 14), torch.get_num_threads()
    want = project_csr(x, spec)
    try:
        for n in (1, 2, 7, 100):
            torch.set_num_threads(n)
            assert torch.equal(dense(project_csr_sparse(x, spec)).float(), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("keep", [2.0**-16, 0.25, 0.3, 0.5, 1 - 2.0**-16])
@pytest.mark.parametrize("kind,nnz", [("countsketch", 1), ("sjlt", 3)])
def test_what_is_kept_of_few_values(kind: Any, nnz: int, keep: float) -> None:
    """Few beside the columns, each is asked for itself: the answer is the mask's."""
    columns = torch.arange(0, 1 << 20, 257)
    values = torch.ones(len(columns))
    x = CsrRows(torch.arange(len(columns) + 1), columns, values, 1 << 20)
    kept = reference.kept_coordinates(ProjectionSpec(12, keep=keep), columns.numpy().astype(np.uint64))
    y = project_csr(x, ProjectionSpec(12, kind=kind, nnz=nnz, keep=keep))
    assert torch.equal((y != 0).sum(1), nnz * torch.from_numpy(kept).long())


@pytest.mark.parametrize("dim,keep", [(1, 0.5), (1, 1.0), (2, 0.3)])
def test_columns_up_to_the_last_coordinate(dim: int, keep: float) -> None:
    """A table of so many draws once had a negative size, which was taken for a small one."""
    # 64 bytes for each of (1 + 1 / 128) * width draws: 2^67 + 1.5 * 2^63, below 0 as an int64.
    width = ((1 << 61) + 3 * (1 << 56)) * 128 // 129
    for n in (width, 1 << 62):
        columns = torch.tensor([5, n - 1, 5, *range(7, 30)])
        x = CsrRows(torch.tensor([0, 2, 3, len(columns)]), columns, torch.ones(len(columns)), n)
        spec = ProjectionSpec(dim, keep=keep)
        got, want = (project_csr(x, spec, backend=backend) for backend in ("cpu", "reference"))
        assert torch.allclose(got, want, rtol=1e-6) and got.abs().sum() > 0


@pytest.mark.parametrize("op", ["project_csr", "project_csr_entries"])
def test_opcheck(op: str) -> None:
    x = made(5, 100, 6)
    for backend in (None, "reference"):
        args = (x.starts, x.columns, x.values, x.width, 0, ProjectionSpec(32).recipe, backend)
        library.opcheck(getattr(torch.ops.cropi, op).default, args)


def test_errors() -> None:
    x, spec = made(3, 50, 4), ProjectionSpec(16)
    n = len(x.values)
    for changed, message in (
        (dict(columns=x.columns + 40), "x.columns run from"),
        (dict(columns=x.columns.float()), r"x.columns is torch.float32 .*torch.int32 or torch.int64"),
        (dict(columns=x.columns.long()), "give both in one dtype"),
        (dict(columns=x.columns[1:]), f"x has {n - 1} columns for {n} values"),
        (dict(values=x.values.half()), "x.values is torch.float16"),
        (dict(values=x.values[None]), "x.values is torch.float32 .*give a 1-D tensor"),
        (dict(starts=x.starts[:-1]), f"must run from 0 to the number of values, {n}"),
        (dict(starts=torch.tensor([0, n, 1, n], dtype=torch.int32)), "must not run backwards"),
    ):
        for function in (project_csr, project_csr_sparse):
            with pytest.raises(ValueError, match=message):
                function(x._replace(**changed), spec)
    with pytest.raises(ValueError, match="kind='gaussian' has no kernel for sparse rows"):
        project_csr(x, ProjectionSpec(16, kind="gaussian"))
    with pytest.raises(ValueError, match="nonfinite='no'"):
        project_csr(x, spec, nonfinite="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the spec has size=20"):
        project_csr(x, ProjectionSpec(16, size=20))
    with pytest.raises(
        RuntimeError, match="backend='triton' cannot run project_csr: sparse rows have no Triton"
    ):
        project_csr(x, spec, backend="triton")


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_without_any_value(index: torch.dtype) -> None:
    """Their memory has no address: the kernel once took that for a call with a dense result, and wrote to address 0."""
    x = CsrRows(torch.zeros(5, dtype=index), torch.zeros(0, dtype=index), torch.zeros(0), 500)
    got = project_csr_sparse(x, ProjectionSpec(64))
    assert got.starts.tolist() == [0] * 5 and got.starts.dtype == index and not len(got.values)
    assert torch.equal(project_csr(x, ProjectionSpec(64)), torch.zeros(4, 64))


def test_a_width_is_an_integer() -> None:
    x = made(5, 100, 6)
    for wrong in (float("nan"), 1.5, -1, None):
        with pytest.raises(ValueError, match="x.width=.*: give the number of the matrix's columns"):
            project_csr(x._replace(width=wrong), ProjectionSpec(64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x.values: the tensor has the layout torch.sparse_coo"):
        project_csr(x._replace(values=x.values.to_sparse()), ProjectionSpec(64))
