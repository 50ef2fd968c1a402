"""`sketch_grouped` against the float64 gradient of the stacked matrix: every range in one call, whatever the widths.

The oracle forms each segment's gradient [groups * rows, cols] and sketches it coordinate by coordinate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fixtures import LEVELS
from support.tensors import normal

from cropi_kernels import MatrixPlan, SketchSpec, fold_inputs, plan_matrix, sketch_grouped, sketch_linear
from cropi_kernels.ops.sketch_linear import coordinates
from cropi_kernels.testing import sum_error_bound

NAME = "model.layers.0.mlp.experts.gate_up_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# groups, rows, cols, width, dim, first row, rows to the next group, rows of the matrix behind the last group.
# Slab rows are 4096 to 128: rows that begin inside of a block, that straddle two or five, that are not a multiple of 8.
SHAPES = [
    (1, 1, 1, None, 32768, 0, 1, 0),
    (3, 7, 9, None, 32768, 0, 7, 0),
    (5, 40, 33, 16, 32768, 0, 40, 0),
    (4, 24, 300, 64, 32768, 24, 24, 8),
    (6, 96, 130, 64, 131072, 0, 96, 0),
    (3, 521, 70, 64, 65536, 11, 600, 5),
    (2, 1100, 129, 128, 32768, 0, 1100, 0),
    (3, 130, 520, None, 131072, 0, 130, 3),
    (7, 16, 513, 256, 32768, 5, 17, 0),
    (1, 37, 130, 64, 32768, 490, 37, 100),
]
# Tokens of group g in segment s: none, one, around the 256 after which sums are flushed; whole groups and segments
# without any.
LENGTHS = [[1, 0, 20], [0, 0, 0], [257, 0, 3], [2, 0, 0], [0, 0, 5], [30, 0, 255], [4, 0, 2]]


@dataclasses.dataclass
class Case:
    plan: MatrixPlan
    d: torch.Tensor
    a: torch.Tensor
    offsets: torch.Tensor
    rows: dict[str, int]
    exact: torch.Tensor
    bound: torch.Tensor

    def run(self, **changes: Any) -> torch.Tensor:
        operands = {"d": self.d, "a": self.a, "offsets": self.offsets, "plan": self.plan} | changes
        out = operands.pop("out", None)
        out = torch.zeros(self.exact.shape) if out is None else out
        got = sketch_grouped(**operands, out=out, **self.rows)
        assert got is out
        return got


def offsets_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *itertools.chain(*lengths)]).cumsum(0)


@functools.cache
def case(shape: tuple[Any, ...], dtype: torch.dtype) -> Case:
    groups, rows, cols, width, dim, first_row, step, behind = shape
    total = first_row + (groups - 1) * step + rows + behind
    plan = plan_matrix(SketchSpec(dim=dim, width=width), NAME, total, cols)
    offsets = offsets_of(LENGTHS[:groups])
    n, segments = int(offsets[-1]), len(LENGTHS[0])
    d, a = normal(n, rows, seed=1, dtype=dtype), normal(n, cols, seed=2, dtype=dtype)
    d[:, 0] *= 100  # the bound must hold where terms are small
    a[:, -1] *= 0.01
    gradient, size = (torch.zeros(segments, total, cols, dtype=torch.float64) for _ in range(2))
    for q, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        g, s = divmod(q, segments)
        span = slice(first_row + g * step, first_row + g * step + rows)
        x, y = d[begin:end].double(), a[begin:end].double()
        gradient[s, span] += x.T @ y
        size[s, span] += x.abs().T @ y.abs()
    bucket, sign = coordinates(plan)
    exact, sizes = (torch.zeros(segments, plan.n_slabs * 32768, dtype=torch.float64) for _ in range(2))
    exact.index_add_(1, bucket.reshape(-1), (gradient * sign).reshape(segments, -1))
    sizes.index_add_(1, bucket.reshape(-1), size.reshape(segments, -1))
    # A product, 256 additions in a block of tokens, then the blocks of tokens and of the matrix; the fold's own.
    depth = 2 + 256 + 2 * plan.n_row_blocks * plan.n_col_blocks + -(-cols // plan.folded_cols)
    bound = sum_error_bound(sizes, depth)
    if plan.col_fold is not None:
        bound += sum_error_bound(sizes, 1, dtype)  # folded inputs are rounded to their own dtype once
    return Case(plan, d, a, offsets, dict(first_row=first_row, row_step=step), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_rounding(shape: tuple[Any, ...], dtype: torch.dtype, level: int, poisoned: None) -> None:
    c = case(shape, dtype)
    out = c.run(backend="cpu")
    assert ((out - c.exact).abs() <= c.bound).all()
    assert not out[1].any(), "a segment without tokens"
    assert torch.equal(c.run(a=fold_inputs(c.a, c.plan), backend="cpu"), out), "folded before the call"
    assert ((c.run(out=out.clone()) - 2 * c.exact).abs() <= 3 * c.bound).all(), "adds to what is there"


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_reference(shape: tuple[Any, ...]) -> None:
    c = case(shape, torch.float32)
    wide = torch.zeros(c.exact.shape, dtype=torch.float64)
    got = c.run(d=c.d.double(), a=c.a.double(), out=wide, backend="reference")
    assert ((got - c.exact).abs() <= 1e-8 * c.bound).all()
    assert ((c.run(backend="reference") - c.exact).abs() <= 2 * c.bound).all()


def test_one_token_of_one_expert() -> None:
    plan = plan_matrix(SketchSpec(width=None), NAME, 8 * 20, 24)
    d, a = normal(1, 20), normal(1, 24, seed=1)
    offsets = torch.tensor([0] * 6 + [1] * 3)  # expert 5
    gradient = torch.zeros(160, 24, dtype=torch.float64)
    gradient[100:120] = d[0].double()[:, None] * a[0].double()
    bucket, sign = coordinates(plan)
    exact = torch.zeros(32768, dtype=torch.float64)
    exact.index_add_(0, bucket.reshape(-1), (gradient * sign).reshape(-1))
    got = sketch_grouped(d, a, offsets, plan, torch.zeros(1, 32768))[0]
    assert ((got - exact).abs() <= sum_error_bound(exact.abs(), 4)).all() and got.count_nonzero() > 400


def test_no_tokens_at_all() -> None:
    plan = plan_matrix(SketchSpec(), NAME, 60, 24)
    out = torch.ones(2, 32768)
    sketch_grouped(torch.zeros(0, 20), torch.zeros(0, 24), torch.zeros(7, dtype=torch.int64), plan, out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    "shape", [(1100, 70, 64, 32768), (33, 513, None, 131072), (7, 9, None, 32768)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_is_a_linear_layer(shape: tuple[Any, ...], dtype: torch.dtype, level: int) -> None:
    rows, cols, width, dim = shape
    plan = plan_matrix(SketchSpec(dim=dim, width=width), NAME, rows, cols)
    d, a, offsets = (
        normal(300, rows, dtype=dtype),
        normal(300, cols, seed=1, dtype=dtype),
        torch.tensor([0, 9, 300]),
    )
    want, got = (torch.zeros(2, plan.n_slabs * 32768) for _ in range(2))
    sketch_linear(d, a, offsets, plan, want)
    sketch_grouped(d, a, offsets, plan, got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("cut", [512, 496, 8, 333], ids=str)
def test_parts_of_the_rows_add_up(cut: int, level: int) -> None:
    """What two ranks of a tensor-parallel layer hold: each its rows, at their place in the matrix."""
    plan = plan_matrix(SketchSpec(width=64), NAME, 1000, 130)
    d, a, offsets = normal(50, 1000), normal(50, 130, seed=1), torch.tensor([0, 20, 50])
    out, size = torch.zeros(2, 32768), torch.zeros(2, 32768)
    sketch_grouped(d[:, :cut], a, offsets, plan, out)
    sketch_grouped(d[:, cut:], a, offsets, plan, out, first_row=cut)
    want = sketch_linear(
        d.double(), a.double(), offsets, plan, torch.zeros(2, 32768).double(), backend="reference"
    )
    bucket, _ = coordinates(plan)
    for s, span in enumerate((slice(0, 20), slice(20, 50))):
        terms = d[span].abs().T @ a[span].abs()
        size[s].index_add_(0, bucket.reshape(-1), terms.reshape(-1))
    assert ((out - want).abs() <= sum_error_bound(size, 50 + 12)).all()


@pytest.mark.parametrize("width", [None, 64])
def test_threads_change_no_bit(width: int | None, level: int) -> None:
    c = case((5, 40, 200, width, 65536, 0, 40, 0), torch.float32)
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        results.append(c.run())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("width, cols", [(None, 4096), (64, 300)])
def test_neighbours_change_no_bit(width: int | None, cols: int, level: int) -> None:
    """A segment alone, and among others. Without a fold, 4096 inputs are worked off in phases of 512 tokens."""
    lengths = [[300, 7, 260], [0, 400, 0], [1, 2, 90]]
    plan = plan_matrix(SketchSpec(width=width), NAME, 3 * 24, cols)
    offsets = offsets_of(lengths)
    d, a = normal(int(offsets[-1]), 24), normal(int(offsets[-1]), cols, seed=1)
    together = sketch_grouped(d, a, offsets, plan, torch.zeros(3, 32768))
    ranges = list(zip(offsets.tolist(), offsets.tolist()[1:]))
    for s in range(3):
        mine = torch.cat([torch.arange(*ranges[g * 3 + s]) for g in range(3)])
        alone = offsets_of([[row[s]] for row in lengths])
        got = sketch_grouped(d[mine], a[mine], alone, plan, torch.zeros(1, 32768))
        assert torch.equal(got[0], together[s])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[7]], ids=str)
def test_a_bad_token_stays_in_its_segment(bad: float, shape: tuple[Any, ...], level: int) -> None:
    c = case(shape, torch.float32)
    clean = c.run()
    for name in ("d", "a"):
        broken = getattr(c, name).clone()
        broken[279, -1] = bad  # of the third group's tokens in the last segment
        got = c.run(**{name: broken})
        assert torch.equal(got[:2], clean[:2]) and clean[:2].any() and not got[2].isfinite().all()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_no_bit(view: str, dtype: torch.dtype) -> None:
    c = case(SHAPES[5], dtype)
    strided = VIEWS[view](c.d), VIEWS[view](c.a)
    assert all(x.stride() != y.stride() or x.storage_offset() for x, y in zip(strided, (c.d, c.a)))
    assert torch.equal(c.run(d=strided[0], a=strided[1]), c.run())


def test_mixed_dtypes_are_read_as_they_are() -> None:
    c = case(SHAPES[3], torch.bfloat16)
    assert torch.equal(c.run(a=fold_inputs(c.a, c.plan).float()), c.run())


PLAN = plan_matrix(SketchSpec(width=16, vocab_width=16), NAME, 60, 40)
TIED = plan_matrix(SketchSpec(width=16, vocab_width=16), NAME, 60, 40, "tied")
D, A = torch.ones(5, 20), torch.ones(5, 40)
OFFSETS = torch.tensor([0, 1, 2, 2, 3, 4, 5])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "three axes": (dict(d=D[None]), r"d has shape \(1, 5, 20\): it must be \[tokens, rows of a group\]"),
    "integers": (dict(d=D.long()), "d is torch.int64: give float32"),
    "inputs": (dict(a=A[:, :39]), r"a has shape \(5, 39\): it must be \[tokens, 40\]"),
    "tokens": (dict(a=A[:4]), "d has 5 tokens but a has 4"),
    "ranges": (dict(offsets=OFFSETS[:-1]), "offsets holds 5 ranges for out's 2 segments: give groups"),
    "backwards": (dict(offsets=OFFSETS.flip(0)), "must not run backwards|run from 5 to 0"),
    "past the tokens": (dict(offsets=OFFSETS + 1), "run from 1 to 6, and there are 5 tokens: give 0 to 5"),
    "past the rows": (dict(first_row=1), "first_row=1, row_step=20: 3 groups of 20 rows .* in the 60 rows"),
    "before the rows": (dict(first_row=-1), "first_row=-1"),
    "overlap": (dict(row_step=19), "row_step=19: 3 groups of 20 rows must lie side by side"),
    "tied": (dict(plan=TIED), "folds its rows .role='tied'."),
    "out": (dict(out=torch.zeros(2, 64)), r"out has shape \(2, 64\): it must be"),
    "half out": (dict(out=torch.zeros(2, 32768).half()), "out is torch.float16"),
    "backend": (dict(backend="gpu"), "backend='gpu': choose one of"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_named_before_work(what: str) -> None:
    changes, message = WRONG[what]
    out = torch.zeros(2, 32768)
    arguments: dict[str, Any] = dict(d=D, a=A, offsets=OFFSETS, plan=PLAN, out=out) | changes
    with pytest.raises(ValueError, match=message):
        sketch_grouped(**arguments)
    assert not out.any()


def test_backends_that_cannot_serve_say_why() -> None:
    out = torch.zeros(2, 32768)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run sketch_grouped: no CUDA C"):
        sketch_grouped(D, A[:, :16], OFFSETS, PLAN, out, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run sketch_grouped: dtype torch.float64"):
        sketch_grouped(D.double(), A[:, :16].double(), OFFSETS, PLAN, out.double(), backend="cpu")
    assert LEVELS, "the CPU kernel is what the other tests ran"
