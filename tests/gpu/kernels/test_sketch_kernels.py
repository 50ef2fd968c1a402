"""The sketch's Triton kernels against float64: awkward shapes, ragged segments, every split, no neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rehearsal import INTERPRETER

from cropi_kernels import (
    SketchSpec,
    fold_inputs,
    fold_outputs,
    plan_matrix,
    plan_vector,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)
from cropi_kernels.ops import _device_plan
from cropi_kernels.ops.sketch_embedding.reference import sketch_embedding as embedding_reference
from cropi_kernels.ops.sketch_linear import triton as kernels
from cropi_kernels.ops.sketch_vector.reference import sketch_vector as vector_reference
from cropi_kernels.plan import MatrixPlan
from cropi_kernels.testing import sketch_and_magnitudes, sum_error_bound


def offsets_of(lengths: list[int], skipped: int = 1) -> torch.Tensor:
    return torch.tensor([skipped, *lengths]).cumsum(0)


def operands(
    plan: MatrixPlan, n: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(n, plan.folded_rows, generator=g)
    return d.to(dtype), torch.randn(n, plan.folded_cols, generator=g).to(dtype)


def oracle(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact sketch and a bound on the error of any float32 sum of its terms."""
    exact, size = sketch_and_magnitudes(d, a, offsets, plan)
    longest = int((offsets[1:] - offsets[:-1]).max())
    per_bucket = plan.n_row_blocks * plan.n_col_blocks * longest
    return exact, sum_error_bound(size, 2 * per_bucket + 2)


CASES = {
    "folded": (100, 96, 64, 32768, [5, 0, 70, 1]),
    "no fold, ragged edges": (300, 200, None, 32768, [5, 0, 70, 1]),
    "exactly one block": (128, 256, None, 32768, [64]),
    "two chunks": (70, 64, 64, 32768, [3, 530]),
    "two slabs": (1100, 64, 64, 65536, [20]),
    "several groups of pairs": (1300, 700, None, 32768, [3, 20]),
    "narrow": (33, 9, None, 32768, [9]),
    "one by one": (1, 1, None, 32768, [3]),
    "width 16": (40, 50, 16, 32768, [17]),
}


@pytest.mark.parametrize("case", CASES)
def test_sketch_linear(case: str, dtype: torch.dtype) -> None:
    rows, cols, width, dim, lengths = CASES[case]
    large = rows * cols * max(lengths) > 400_000
    if INTERPRETER and dtype == torch.float32 and large:
        pytest.skip("the exact float32 tiles are small: too many programs to interpret")
    spec = SketchSpec(dim=dim, width=width)
    plan = plan_matrix(spec, "a.b.weight", rows, cols)
    offsets = offsets_of(lengths)
    d, a = operands(plan, int(offsets[-1]) + 2, dtype)
    exact, bound = oracle(d, a, offsets, plan)
    start = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    out = sketch_linear(d, a, offsets, plan, start.clone(), backend="triton")
    error = (out.double() - start.double() - exact).abs()
    assert (error <= bound + 2.0**-22 * (start.abs() + exact.abs() + 1e-6)).all(), float(error.max())


def test_a_segment_is_alone_in_the_world(half: torch.dtype) -> None:
    """Chunks are counted from a segment's own first token: the same bits in any company, and on every run."""
    plan = plan_matrix(SketchSpec(), "a.b.weight", 60, 64)
    d, a = operands(plan, 560, half)
    together = torch.zeros(4, 32768)
    sketch_linear(d, a, torch.tensor([0, 7, 7, 537, 560]), plan, together, backend="triton")
    for s, (begin, end) in enumerate([(0, 7), (7, 7), (7, 537), (537, 560)]):
        alone = torch.zeros(1, 32768)
        sketch_linear(
            d[begin:end], a[begin:end], torch.tensor([0, end - begin]), plan, alone, backend="triton"
        )
        assert torch.equal(alone[0], together[s])


def test_not_a_number_stays_in_its_segment(half: torch.dtype) -> None:
    plan = plan_matrix(SketchSpec(), "a.b.weight", 60, 64)
    d, a = operands(plan, 90, half)
    clean = sketch_linear(d, a, torch.tensor([0, 30, 61, 90]), plan, torch.zeros(3, 32768), backend="triton")
    a[40], d[60, 5] = float("nan"), float("inf")
    broken = sketch_linear(d, a, torch.tensor([0, 30, 61, 90]), plan, torch.zeros(3, 32768), backend="triton")
    assert torch.equal(broken[0], clean[0]) and torch.equal(broken[2], clean[2])
    assert broken[1].isnan().any()


def test_strided_operands_of_different_dtypes(half: torch.dtype) -> None:
    plan = plan_matrix(SketchSpec(), "a.b.weight", 60, 64)
    d, a = operands(plan, 50, half)
    offsets = torch.tensor([0, 50])
    expected = sketch_linear(d.float(), a.float(), offsets, plan, torch.zeros(1, 32768), backend="triton")
    wide = torch.zeros(50, 200, dtype=half)
    wide[:, 3:63] = d
    out = sketch_linear(wide[:, 3:63], a.float(), offsets, plan, torch.zeros(1, 32768), backend="triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("cols,width", [(96, 64), (1003, 128), (513, 256), (40, 16)])
def test_fold_inputs(cols: int, width: int, dtype: torch.dtype) -> None:
    plan = plan_matrix(SketchSpec(width=width), "a.b.weight", 8, cols)
    x = torch.randn(37, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = fold_inputs(x.double(), plan, backend="reference")
    size = fold_inputs(x.double().abs(), plan, backend="reference").abs() + x.abs().double().sum(
        1, keepdim=True
    )
    got = fold_inputs(x, plan, backend="triton")
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert got.dtype == dtype
    assert (
        (got.double() - exact).abs() <= sum_error_bound(size, cols // width + 1) + rounding * exact.abs()
    ).all()


def test_fold_outputs_of_a_tied_head() -> None:
    plan = plan_matrix(SketchSpec(vocab_width=128), "embed.weight", 1003, 24, role="tied")
    x = torch.randn(11, 1003, generator=torch.Generator().manual_seed(0))
    got, exact = fold_outputs(x, plan, backend="triton"), fold_outputs(x.double(), plan, backend="reference")
    assert ((got.double() - exact).abs() <= sum_error_bound(x.abs().double().sum(1, keepdim=True), 9)).all()


@pytest.mark.parametrize("role,rows,cols,dim", [("embedding", 300, 40, 32768), ("tied", 1003, 300, 65536)])
def test_sketch_embedding(role: str, rows: int, cols: int, dim: int) -> None:
    spec = SketchSpec(dim=dim, vocab_width=128)
    plan = plan_matrix(spec, "embed.weight", rows, cols, role=role)  # type: ignore[arg-type]
    offsets = offsets_of([30, 0, 290] if role == "embedding" else [40])
    n = int(offsets[-1]) + 1
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(n, cols, generator=g), torch.randint(0, rows, (n,), generator=g)
    ids[offsets[0] : offsets[0] + 9] = 5  # many tokens on one row
    shape = offsets.numel() - 1, spec.base_dim
    exact = embedding_reference(x.double(), ids, offsets, plan, torch.zeros(shape, dtype=torch.float64))
    size = x.abs().double().sum()
    got = sketch_embedding(x, ids, offsets, plan, torch.zeros(shape), backend="triton")
    assert ((got.double() - exact).abs() <= sum_error_bound(size, 2)).all()
    assert torch.equal(got != 0, exact != 0)


def test_an_unknown_row_breaks_only_its_segment() -> None:
    plan = plan_matrix(SketchSpec(), "embed.weight", 50, 24, role="embedding")
    x, ids, out = torch.ones(6, 24), torch.tensor([1, 2, 3, 50, 5, 6]), torch.zeros(2, 32768)
    from cropi_kernels.ops.sketch_embedding import triton as kernels_rows

    kernels_rows.sketch_embedding(x, ids, torch.tensor([0, 3, 6]), plan, out)
    assert out[0].isfinite().all() and out[1].isnan().any()


@pytest.mark.parametrize("size,dim", [(1, 32768), (777, 32768), (70_000, 32768), (70_000, 65536)])
def test_sketch_vector(size: int, dim: int) -> None:
    plan = plan_vector(SketchSpec(dim=dim), "a.bias", size)
    g = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    exact = vector_reference(g.double(), plan, torch.ones(2, dim, dtype=torch.float64))
    got = sketch_vector(g, plan, torch.ones(2, dim), backend="triton")
    assert ((got.double() - exact).abs() <= sum_error_bound(g.abs().double().max() * 4 + 1, 4)).all()


def test_tables_hold_the_plan_to_the_bit() -> None:
    plan = plan_matrix(SketchSpec(dim=131072, width=None), "a.b.weight", 700, 900)
    tables = _device_plan.matrix_tables(plan, torch.device("cpu"))
    words = tables.pairs.numpy().view(np.uint64)
    part = lambda shift, bits: (words >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.int64)  # noqa: E731
    row, col = part(48, 15), part(32, 16)
    assert sorted(zip(row, col)) == [
        (i, j) for i in range(plan.n_row_blocks) for j in range(plan.n_col_blocks)
    ]
    assert np.array_equal(part(0, 16), plan.pair_row[row, col]) and np.array_equal(
        part(16, 16), plan.pair_col[row, col]
    )
    assert np.array_equal(np.where(part(63, 1), -1.0, 1.0), plan.pair_sign[row, col])
    first = tables.first.numpy()
    slab = np.repeat(np.arange(plan.n_slabs), np.diff(first))
    assert np.array_equal(slab, plan.pair_slab[row, col]) and tables.most_pairs == np.diff(first).max()
    assert _device_plan.matrix_tables(plan, torch.device("cpu")) is tables, "uploaded again"


def test_group_size_fits_the_kernel() -> None:
    assert max(map(kernels.group_pairs, (16, 64, 128, 256))) <= 32, (
        "a warp holds the words of a group's pairs, one per lane"
    )
