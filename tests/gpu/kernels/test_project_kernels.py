"""`project` in Triton: every bucket and sign of the spec, any cut of the call, and sums within their bound."""

from __future__ import annotations

import pytest
import torch

from cropi_kernels import ProjectionSpec, project, project_transpose
from cropi_kernels.ops.project import triton as kernels
from cropi_kernels.testing import sum_error_bound

S = ProjectionSpec
CASES = {
    "several tiles": (S(256), 3011, 5),
    "above 2^32": (S(512, seed=1), 3000, 2**32 - 999),
    "group of one": (S(7), 40, 3),
    "one bucket": (S(1), 9, 2**40),
    "wide": (S(4096), 10_000, 48),
    # The adjoint's last run of 512 ends two numbers behind the row.
    "keep": (S(512, keep=0.3), 512 * 4 - 2, 128),
    "sjlt": (S(240, kind="sjlt", nnz=3), 3011, 32),
    "sjlt, keep, groups of four": (S(60, kind="sjlt", nnz=3, keep=0.5), 400, 1),
}


@pytest.fixture(params=[1 << 25, 1 << 10], ids=["one window", "many windows"])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WINDOW", request.param)


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("case", CASES)
def test_the_map_is_that_of_the_reference(case: str, dtype: torch.dtype) -> None:
    spec, n, offset = CASES[case]
    g = torch.Generator().manual_seed(0)
    one = torch.zeros(2, n)
    one[0, n // 2] = one[1, n - 1] = 1.0  # single coordinates: to the bit
    got = project(one.to(dtype), spec, offset, backend="triton")
    assert torch.equal(got, project(one, spec, offset, backend="reference"))
    x = torch.randn(2, n, generator=g).to(dtype)
    exact = project(x.double(), spec, offset, backend="reference")
    size = x.double().norm(1, dim=1, keepdim=True) * spec.scale
    got = project(x, spec, offset, backend="triton")
    terms = 4 * (n * spec.nnz // spec.dim) + 60  # of one bucket, generously
    assert ((got.double() - exact).abs() <= sum_error_bound(size, terms)).all()
    y = torch.randn(2, spec.dim, generator=g)
    back = project_transpose(y, spec, n, offset, backend="triton")
    exact = project_transpose(y.double(), spec, n, offset, backend="reference")
    size = y.double().norm(1, dim=1, keepdim=True) * spec.scale
    assert ((back.double() - exact).abs() <= sum_error_bound(size, spec.nnz + 4)).all()


def test_strided_rows_and_columns_and_chunks() -> None:
    spec, big = S(128), torch.randn(4, 700, generator=torch.Generator().manual_seed(1))
    view = big[::2, 9:609]
    assert torch.equal(
        project(view, spec, 3, backend="triton"), project(view.contiguous(), spec, 3, backend="triton")
    )
    exact = project(view.double(), spec, 3, backend="reference")
    bound = sum_error_bound(view.double().norm(1, dim=1, keepdim=True), 60)
    out = torch.zeros(2, 128)
    for begin, end in ((200, 600), (0, 1), (1, 200)):
        project(view[:, begin:end], spec, 3 + begin, out=out, backend="triton")
    assert ((out.double() - exact).abs() <= bound).all()
    apart = view.t().contiguous().t()
    assert ((project(apart, spec, 3, backend="triton").double() - exact).abs() <= bound).all()


def test_a_row_that_is_not_finite_stays_alone_and_dense_kinds_say_why() -> None:
    spec, x = S(64), torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    want = project(x, spec, backend="triton")
    x[1, 77] = torch.nan
    got = project(x, spec, backend="triton", nonfinite="ignore")
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], want[[0, 2]])
    with pytest.raises(RuntimeError, match="gaussian projections have no Triton kernel"):
        project(x, S(64, kind="gaussian"), backend="triton")
