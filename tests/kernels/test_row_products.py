"""row_products against float64: every way a row is stored, every instruction set, and bits that do not move."""

from __future__ import annotations

import pytest
import torch

from cropi_kernels import _native, quantize_rows, row_products
from cropi_kernels.ops.row_products.reference import unpack

KINDS = ["float32", "bfloat16", "float16", "int8", "int4", "int1"]
LEVELS = [1, 3, 4]


def stored(
    kind: str, n: int, dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None, int | None]:
    """Rows as a store holds them, with scales of very different sizes: values, scale, bits."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, dim, generator=generator) * torch.logspace(-6, 6, n)[:, None]
    if kind in ("float16", "int8"):
        held = quantize_rows(rows, getattr(torch, kind))
        return held.values, held.scale, None
    if kind in ("int4", "int1"):
        bits = int(kind[3:])
        packed = torch.randint(0, 256, (n, dim * bits // 8), generator=generator, dtype=torch.uint8)
        return packed, torch.rand(n, 2, generator=generator) * 10.0 ** torch.randint(-9, 9, (n, 2)), bits
    return rows.to(getattr(torch, kind)), None, None


def exact(rows: torch.Tensor, scale: torch.Tensor | None, bits: int | None) -> torch.Tensor:
    x = unpack(rows, bits).float() if bits else rows.float()
    if scale is not None and len(x):
        x = (x.view(*scale.shape, -1) * scale[..., None]).view_as(x)
    return x.double()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> int:
    native = _native.native()
    before = native.current_level()
    native.set_level(request.param)
    if native.current_level() != request.param:
        native.set_level(before)
        pytest.skip("this machine or build has not got that instruction set")
    yield request.param
    native.set_level(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(1, 8), (37, 1000), (9, 512), (70, 1544), (0, 64)])
def test_products_are_within_rounding(level: int, kind: str, n: int, dim: int) -> None:
    rows, scale, bits = stored(kind, n, dim)
    x = exact(rows, scale, bits)
    for count in (1, 3, 0):
        directions = torch.randn(count, dim, generator=torch.Generator().manual_seed(1))
        products, squares = row_products(rows, directions, scale, bits=bits, backend="cpu")
        assert products.shape == (n, count) and squares.shape == (n,)
        bound = (512 / 8 + 6) * 2.0**-24
        wide = directions.double()
        assert bool(((products - x @ wide.T).abs() <= bound * (x.abs() @ wide.abs().T) + 1e-300).all())
        assert bool(((squares - x.square().sum(1)).abs() <= bound * x.square().sum(1) + 1e-300).all())
        reference = row_products(rows, directions, scale, bits=bits, backend="reference")
        torch.testing.assert_close(reference[0], x @ wide.T, rtol=1e-12, atol=1e-300)
        torch.testing.assert_close(reference[1], x.square().sum(1), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_have_equal_bits_wherever_they_stand(level: int, kind: str) -> None:
    """Ties are settled by id: a row's score must not depend on its place, its neighbours or the number of threads."""
    rows, scale, bits = stored(kind, 45, 1416)
    directions = torch.randn(5, 1416)
    alone = [
        row_products(rows[i : i + 1], directions, None if scale is None else scale[i : i + 1], bits=bits)
        for i in range(45)
    ]
    want = torch.cat([products for products, _ in alone]), torch.cat([squares for _, squares in alone])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = row_products(rows, directions, scale, bits=bits)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.set_num_threads(before)
    one_by_one = torch.cat([row_products(rows, d[None], scale, bits=bits)[0] for d in directions], dim=1)
    assert torch.equal(one_by_one, want[0]), "nor on the other directions"


@pytest.mark.parametrize("count", [4, 65])
def test_the_number_of_threads_changes_no_bit(level: int, count: int) -> None:
    """From 64 directions on, tasks of one or two threads have 128 of these rows, and those of three have 32."""
    rows, directions = torch.randn(300, 552), torch.randn(count, 552)
    alone = row_products(rows, directions, threads=1)
    for threads in (2, 3, None):
        assert all(map(torch.equal, row_products(rows, directions, threads=threads), alone))
    one_by_one = [row_products(rows, d[None])[0] for d in directions]
    assert torch.equal(torch.cat(one_by_one, dim=1), alone[0])


def test_not_a_number_stays_in_its_row() -> None:
    rows = torch.randn(20, 64)
    clean = row_products(rows, rows[:3])
    rows[7, 5], rows[9, 0] = float("nan"), float("inf")
    products, squares = row_products(rows, torch.randn(3, 64))
    assert bool(products[7].isnan().all()) and bool(squares[7].isnan()) and not bool(squares[9].isfinite())
    rest = [i for i in range(20) if i not in (7, 9)]
    assert torch.equal(row_products(rows, clean[0].new_zeros(0, 64).float())[1][rest], clean[1][rest])
    scale = torch.ones(2, 1)
    scale[1] = float("nan")
    assert row_products(torch.ones(2, 8, dtype=torch.int8), torch.ones(1, 8), scale)[0].isnan().tolist() == [
        [False],
        [True],
    ]


def test_strides_and_the_graph_do_not_matter() -> None:
    rows, directions = torch.randn(6, 40), torch.randn(4, 20)
    got = row_products(
        rows[::2, ::2].requires_grad_(), directions.t().contiguous().t(), torch.ones(6, 4)[::2, ::2]
    )
    want = row_products(rows[::2, ::2].detach().contiguous(), directions)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not got[0].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(2, 9)}, r"rows have 9 entries, but directions has shape \(1, 8\)"),
        ({"rows": torch.ones(2, 8, dtype=torch.float64)}, "rows is torch.float64 .*: give float32, bfloat16, float16"),
        ({"rows": torch.ones(2, 8, dtype=torch.uint8)}, "rows is torch.uint8"),
        ({"bits": 4}, r"rows is torch.float32 \(2, 8\): give uint8"),
        ({"bits": 2}, "bits=2: rows are packed with 4 or 1 bits"),
        ({"directions": torch.ones(8)}, "directions is torch.float32 .*: give float32"),
        ({"scale": torch.ones(2)}, "scale is torch.float32 .*: give float32"),
        ({"scale": torch.ones(2, 3)}, "scale has 3 blocks, which do not divide 8 entries"),
        ({"scale": torch.ones(3, 1)}, r"give float32 \[2, blocks\]"),
        ({"rows": torch.ones(2, 8).to_sparse()}, "rows"),
        ({"threads": 0}, "threads=0: give a number from 1 to 1024, or None"),
        ({"threads": -1}, "threads=-1: give a number from 1 to 1024"),
        ({"threads": 10**9}, "threads=1000000000: give a number from 1 to 1024"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    given = {"rows": torch.ones(2, 8), "directions": torch.ones(1, 8)} | change
    with pytest.raises(ValueError, match=message):
        row_products(**given)  # type: ignore[arg-type]
