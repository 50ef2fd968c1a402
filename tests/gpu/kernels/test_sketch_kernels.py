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
from cropi_kernels.ops._triton_segments import cut, reduce_partials
from cropi_kernels.ops.sketch_linear import triton as kernels
from cropi_kernels.ops.sketch_vector.reference import sketch_vector as vector_reference
from cropi_kernels.ops.sketch_vector.triton import sketch_tail
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


def test_one_group_of_more_pairs_than_a_warp_has_lanes(
    half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order, and where there are kernels by turns in the way, in which pairs share tiles of D."""
    monkeypatch.setattr(kernels, "group_pairs", lambda cols, pairs: 36)
    monkeypatch.setattr(kernels, "HELD_FROM", 36)
    plan = plan_matrix(SketchSpec(width=None), "a.b.weight", 48, 9216)
    offsets = torch.tensor([0, 3, 3, 5])
    d, a = operands(plan, 5, half)
    exact, bound = oracle(d, a, offsets, plan)
    out = sketch_linear(d, a, offsets, plan, torch.zeros(3, 32768), backend="triton")
    assert kernels.stack_of((plan,), d.device, half).groups == 1
    assert ((out.double() - exact).abs() <= bound).all()


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


@pytest.mark.parametrize(
    "role,rows,cols,dim",
    [("embedding", 300, 40, 32768), ("tied", 1003, 300, 65536), ("linear", 300, 40, 32768)],
)
def test_sketch_embedding(role: str, rows: int, cols: int, dim: int) -> None:
    """A linear map's plan folds the columns: the rows of a gradient that exists are sketched so."""
    spec = SketchSpec(dim=dim, vocab_width=128, width=16)
    plan = plan_matrix(spec, "embed.weight", rows, cols, role=role)  # type: ignore[arg-type]
    assert (plan.col_fold is not None) == (role == "linear")
    offsets = offsets_of([40] if role == "tied" else [30, 0, 290])
    n = int(offsets[-1]) + 1
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(n, cols, generator=g), torch.randint(0, rows, (n,), generator=g)
    ids[offsets[0] : offsets[0] + 9] = 5  # many tokens on one row
    shape = offsets.numel() - 1, spec.base_dim
    exact = torch.zeros(shape, dtype=torch.float64)
    sketch_embedding(x.double(), ids, offsets, plan, exact, backend="reference")
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
    exact = torch.ones(2, dim, dtype=torch.float64)
    vector_reference(g.double(), plan, exact)
    got = sketch_vector(g, plan, torch.ones(2, dim), backend="triton")
    assert ((got.double() - exact).abs() <= sum_error_bound(g.abs().double().max() * 4 + 1, 4)).all()


def test_tables_hold_the_plan_to_the_bit() -> None:
    """Of two matrices one above the other, whose row blocks are numbered through."""
    spec = SketchSpec(dim=131072, width=None)
    plans = tuple(plan_matrix(spec, f"a.{name}.weight", rows, 900) for name, rows in (("b", 700), ("c", 300)))
    stack = kernels.stack_of(plans, torch.device("cpu"), torch.float32)
    words = stack.pairs.numpy().view(np.uint64)
    part = lambda shift, bits: (words >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.int64)  # noqa: E731
    row, col = part(48, 15), part(32, 16)
    blocks = sum(plan.n_row_blocks for plan in plans)
    assert sorted(zip(row, col)) == [(i, j) for i in range(blocks) for j in range(plans[0].n_col_blocks)]
    both = lambda name: np.concatenate([getattr(plan, name) for plan in plans])[row, col]  # noqa: E731
    assert np.array_equal(part(0, 16), both("pair_row")) and np.array_equal(part(16, 16), both("pair_col"))
    assert np.array_equal(np.where(part(63, 1), -1.0, 1.0), both("pair_sign"))
    count = np.diff(stack.first.numpy())
    assert np.array_equal(np.repeat(np.arange(stack.n_slabs), count), both("pair_slab"))
    assert stack.groups * stack.group_pairs >= count.max() > stack.groups * (stack.group_pairs - 1)
    signs = np.stack([plan.col_sign for plan in plans])
    assert np.array_equal(signs[0], signs[1]), "matrices that share their inputs share the signs of columns"
    column = col[:, None] * plans[0].slab_cols + (np.arange(plans[0].slab_cols) ^ part(16, 16)[:, None])
    bits = stack.flips.numpy()[:, np.arange(plans[0].slab_cols) % 8] >> np.arange(plans[0].slab_cols) // 8 & 1
    inside = column < plans[0].cols
    assert (
        np.array_equal(np.where(bits, -1.0, 1.0)[inside], signs[0][column[inside]])
        and not bits[~inside].any()
    )
    assert stack.begins == (plans[0].n_row_blocks, 1 << 15)
    assert kernels.stack_of(plans, torch.device("cpu"), torch.float32) is stack, "uploaded again"


@pytest.mark.parametrize("names", ["gate up", "q k v"])
def test_matrices_in_one_launch(names: str, dtype: torch.dtype) -> None:
    """Added to what the slots hold; every slot by one program, whatever the number of chunks."""
    spec, n = SketchSpec(), 560
    plans = tuple(plan_matrix(spec, f"a.{m}.weight", 40 + 30 * i, 96) for i, m in enumerate(names.split()))
    offsets = torch.tensor([3, 20, 20, 555])
    made = [operands(plan, n, dtype, seed=i) for i, plan in enumerate(plans)]
    a = made[0][1]
    exact, bound = map(sum, zip(*(oracle(d, a, offsets, plan) for (d, _), plan in zip(made, plans))))
    stack = kernels.stack_of(plans, a.device, dtype)
    chunks = cut(offsets, n, stack.chunk, True)
    sums, out = torch.zeros(chunks.n_slots, stack.groups + 1, 32768), torch.zeros(3, 32768)
    for _ in range(2):
        kernels.add_slabs(
            stack, [d for d, _ in made], [d.shape[1] for d, _ in made], a, 64, out, sums, chunks, "sums"
        )
    reduce_partials(sums, out, chunks, sums.shape[1])
    assert ((out.double() - 2 * exact).abs() <= 2 * bound + 2.0**-22 * exact.abs()).all()


def test_vectors_from_their_sums_over_chunks() -> None:
    """One of several pieces, in sketches of two slabs; as if each had been summed and sketched alone."""
    g, spec = torch.Generator().manual_seed(0), SketchSpec(dim=65536)
    plans = tuple(plan_vector(spec, f"{n}.weight", n) for n in (777, 70_000, 8))
    chunks = cut(torch.tensor([2, 70, 70, 130]), 140, 32, True)
    x = [torch.randn(130 // 32 + 3 + 4, plan.size, generator=g)[: chunks.n_slots] for plan in plans]
    out = torch.ones(3, 65536)
    sketch_tail(torch.cat([part.reshape(-1) for part in x]), plans, chunks, out)
    # Tokens 2 to 70 are chunks 0 to 2, tokens 70 to 130 are chunks 3 and 4.
    sums = [torch.stack([p[:3].sum(0), p[:0].sum(0), p[3:5].sum(0)]).double() for p in x]
    exact = torch.ones(3, 65536, dtype=torch.float64)
    for part, plan in zip(sums, plans):
        vector_reference(part, plan, exact)
    assert ((out - exact).abs() <= sum_error_bound(torch.tensor(40.0), 12)).all() and (out[1] == 1).all()


def test_group_size_fits_the_kernel() -> None:
    for cols in (16, 64, 128, 256):
        sizes = [kernels.group_pairs(cols, pairs) for pairs in range(1, 3000)]
        assert 1 <= min(sizes) and max(sizes) == kernels.group_pairs(cols, 1 << 30)
        assert kernels.lanes(cols) <= 64, "a warp holds the words of a group's pairs, at most two per lane"


def test_long_chunks_take_their_turns_first() -> None:
    """Every chunk once, with its own slot, whatever the turn; where decreasing offsets ask for more chunks than there
    is room for, rows are as before: none is left unwritten."""
    g = torch.Generator().manual_seed(0)
    for n_segments in (1, 7, 70):
        lengths = torch.randint(0, 50, (n_segments,), generator=g)
        offsets = offsets_of(lengths.tolist(), skipped=2)
        chunks = cut(offsets, int(offsets[-1]) + 3, 16, True)
        rows = chunks.table[: chunks.n_items * 4].view(-1, 4)
        real = rows[rows[:, 0] < n_segments]
        starts = [
            (s, int(offsets[s]) + 16 * k) for s in range(n_segments) for k in range(-(-int(lengths[s]) // 16))
        ]
        assert torch.equal(rows[: len(real)], real) and len(real) == len(starts)
        size = real[:, 2] - real[:, 1]
        assert (size > 0).all() and (size.diff() <= 0).all()
        by_slot = real[real[:, 3].argsort()]
        assert by_slot[:, 3].tolist() == list(range(len(real)))
        assert [tuple(row) for row in by_slot[:, :2].tolist()] == starts
    chunks = cut(torch.tensor([0, 100, 3, 90, 5, 100]), 100, 16, True)
    rows = chunks.table[: chunks.n_items * 4].view(-1, 4)
    assert ((rows[:, :3] >= 0) & (rows[:, :3] <= torch.tensor([5, 100, 100]))).all()
    assert rows[:, 3].tolist() == list(range(chunks.n_items))
