"""flat_sketch in Triton: the CPU's hash to the bit, sums that have no order, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from cropi_kernels import SketchSpec, flat_sketch
from cropi_kernels.testing import sum_error_bound

FAR = (1 << 40) + 3  # beyond 32 bits, and not at the start of a draw
CASES = [
    (1, 64, 1.0, 0),
    (3, 1024, 1.0, 2),
    (5003, 4096, 1.0, 7),
    (40_000, 32768, 0.1, FAR),
    (9000, 64, 0.5, 1),
]


@pytest.mark.parametrize("n,dim,keep,offset", CASES)
def test_every_coordinate_goes_where_the_cpu_puts_it(n: int, dim: int, keep: float, offset: int) -> None:
    """Small integers have exact sums in any order (a power-of-two share of kept ones leaves them so): equal bits."""
    spec = SketchSpec(kind="dropout", keep=0.25 if keep != 1.0 else 1.0, dim=dim, seed=3)
    x = torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(0)).float()
    got = flat_sketch(x, spec, "a.weight", torch.zeros(dim), offset=offset, backend="triton")
    want = flat_sketch(x, spec, "a.weight", torch.zeros(dim), offset=offset, backend="cpu")
    assert torch.equal(got, want) and (n < 10 or bool(want.any()))


@pytest.mark.parametrize("n,dim,keep,offset", CASES)
def test_sums_within_the_rounding_of_one_addition(n: int, dim: int, keep: float, offset: int) -> None:
    """Fixed point is finer than float32: what remains is the last rounding, whatever the number of terms."""
    spec = SketchSpec(kind="dropout", keep=keep, dim=dim)
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 1e3
    start = torch.randn(dim, generator=torch.Generator().manual_seed(1))
    exact = flat_sketch(x.double(), spec, "a.weight", start.double(), offset=offset, backend="reference")
    got = flat_sketch(x, spec, "a.weight", start.clone(), offset=offset, backend="triton")
    bound = sum_error_bound((exact - start).abs() + exact.abs(), 2) + 1e-12 * float(x.abs().max()) * n
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e38, 0.0])
def test_the_unit_fits_any_range(size: float) -> None:
    spec = SketchSpec(kind="countsketch", dim=64)
    x = torch.full((300,), size)
    got = flat_sketch(x, spec, "w", torch.zeros(64), backend="triton")
    exact = flat_sketch(x.double(), spec, "w", torch.zeros(64).double(), backend="reference")
    assert torch.equal(got, exact.float())


def test_shards_add_up_to_the_whole() -> None:
    spec = SketchSpec(kind="countsketch", dim=128)
    x = torch.randint(-8, 9, (1000,), generator=torch.Generator().manual_seed(0)).float()
    whole = flat_sketch(x, spec, "w", torch.zeros(128), backend="triton")
    parts = torch.zeros(128)
    for begin, end in ((0, 1), (1, 630), (630, 1000)):
        flat_sketch(x[begin:end], spec, "w", parts, offset=begin, backend="triton")
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.ones(3000)
    x[1234] = bad
    out = flat_sketch(x, SketchSpec(kind="countsketch", dim=64), "w", torch.zeros(64), backend="triton")
    assert out.isnan().all()
    assert not flat_sketch(
        torch.ones(0), SketchSpec(kind="countsketch", dim=64), "w", torch.zeros(64), backend="triton"
    ).any()
