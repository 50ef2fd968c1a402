"""The sketch ops against their float64 definition, within rounding bounds computed from the actual magnitudes.

A bound here is ``1.01 * depth * eps * sum |terms|``: depth is the longest chain of roundings that a term goes through
(products, additions within a block of tokens, additions of blocks), whatever the order of the rest.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.tensors import normal

from cropi_kernels import (
    MatrixPlan,
    SketchSpec,
    bias_grad,
    fold_inputs,
    fold_outputs,
    norm_grad,
    plan_matrix,
    plan_vector,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)
from cropi_kernels.ops.sketch_linear import coordinates
from cropi_kernels.testing import sum_error_bound

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of segments: none, one, and around the 256 tokens after which sums are flushed.
LENGTHS = [1, 0, 255, 257, 3, 0]

# rows, cols, width, dim. Slabs of 8 to 256 columns, one to fifteen blocks, one and four slabs, with and without fold.
SHAPES = [
    (1, 1, None, 32768),
    (7, 9, None, 64),
    (8, 8, None, 32768),
    (9, 17, None, 131072),
    (17, 127, None, 32768),
    (4100, 7, None, 131072),
    (513, 33, None, 32768),
    (1030, 31, None, 131072),
    (127, 513, None, 32768),
    (513, 513, None, 131072),
    (1, 513, 16, 32768),
    (33, 17, 16, 32768),
    (2100, 127, 16, 32768),
    (513, 129, 64, 131072),
    (9, 513, 256, 32768),
]


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def make_plan(rows: int, cols: int, width: int | None, dim: int, role: str = "linear") -> MatrixPlan:
    return plan_matrix(SketchSpec(dim=dim, width=width, vocab_width=width), NAME, rows, cols, role)  # type: ignore[arg-type]


def blank(n: int, plan: MatrixPlan) -> torch.Tensor:
    return torch.zeros(n, plan.n_slabs * 32768)


@pytest.fixture
def poison(poisoned: None) -> Iterator[None]:
    """Every buffer starts as NaN in torch and as 3.4e38 in C++: an element that nobody wrote, or a stray one, shows."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    # Sanitizers bring a malloc of their own.
    if libc is None or not hasattr(libc, "mallopt") or "CROPI_SANITIZED" in os.environ:
        yield
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: mapped memory would be zero
    libc.mallopt(-6, 0x80)  # M_PERTURB: new memory is filled with its complement
    # Smaller blocks come from the thread's cache, which glibc 2.41 hands out as they were freed.
    assert torch.empty(2048, dtype=torch.uint8).eq(0x7F).float().mean() > 0.5
    yield
    libc.mallopt(-6, 0)
    libc.mallopt(-4, 65536)


# ------------------------------------------------------------------------------------------ sketch_linear
@functools.cache
def linear_case(
    rows: int, cols: int, width: int | None, dim: int, dtype: torch.dtype
) -> tuple[MatrixPlan, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan, inputs, the exact sketches and their error bound."""
    plan, offsets = make_plan(rows, cols, width, dim), offsets_of(LENGTHS)
    n = int(offsets[-1])
    d, a = normal(n, rows, seed=1, dtype=dtype), normal(n, cols, seed=2, dtype=dtype)
    d[:, 0] *= 100  # rows and columns of other sizes: the bound must hold where the terms are small
    a[:, -1] *= 0.01
    exact, size = (blank(len(LENGTHS), plan).double() for _ in range(2))
    bucket, sign = (x.reshape(-1) for x in coordinates(plan))
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        x, y = d[begin:end].double(), a[begin:end].double()
        exact[s].index_add_(0, bucket, (x.T @ y).reshape(-1) * sign)
        size[s].index_add_(0, bucket, (x.abs().T @ y.abs()).reshape(-1))
    folds = -(-cols // plan.folded_cols)
    # The longest segment has two blocks of tokens.
    depth = 2 + 256 + 2 * plan.n_row_blocks * plan.n_col_blocks + folds
    bound = sum_error_bound(size, depth)
    if plan.col_fold is not None:
        bound += sum_error_bound(size, 1, dtype)  # folded inputs are rounded to their own dtype once
    return plan, d, a, exact, bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketch_linear_within_rounding(
    shape: tuple[int, int, int | None, int], dtype: torch.dtype, level: int, poison: None
) -> None:
    plan, d, a, exact, bound = linear_case(*shape, dtype)
    offsets, out = offsets_of(LENGTHS), blank(len(LENGTHS), plan)
    assert sketch_linear(d, a, offsets, plan, out, backend="cpu") is out
    assert ((out - exact).abs() <= bound).all()
    assert not out[[1, 5]].any()
    again = blank(len(LENGTHS), plan)
    sketch_linear(d, fold_inputs(a, plan), offsets, plan, again)
    assert torch.equal(out, again), "folding before or inside the call, twice the same bits"
    sketch_linear(d, a, offsets, plan, again)
    assert ((again - 2 * exact).abs() <= 3 * bound).all(), "adds to what is there"


@pytest.mark.parametrize("shape", SHAPES[3:8], ids=str)
def test_reference_of_sketch_linear(shape: tuple[int, int, int | None, int]) -> None:
    plan, d, a, exact, bound = linear_case(*shape, torch.float32)
    out = blank(len(LENGTHS), plan)
    sketch_linear(d, a, offsets_of(LENGTHS), plan, out, backend="reference")
    assert ((out - exact).abs() <= 2 * bound).all()
    wide = out.double().zero_()
    sketch_linear(d.double(), a.double(), offsets_of(LENGTHS), plan, wide)
    assert ((wide - exact).abs() <= bound * 1e-8).all()


def test_tokens_outside_all_segments_do_not_count(level: int) -> None:
    plan, d, a, _, _ = linear_case(*SHAPES[4], torch.float32)
    out, inside = blank(2, plan), blank(2, plan)
    sketch_linear(d, a, torch.tensor([10, 40, 300]), plan, out)
    sketch_linear(d[10:300].clone(), a[10:300].clone(), torch.tensor([0, 30, 290]), plan, inside)
    assert torch.equal(out, inside) and out.any()


@pytest.mark.parametrize("n_tokens, lengths", [(0, []), (0, [0, 0]), (5, [0, 0])], ids=str)
def test_nothing_to_add(n_tokens: int, lengths: list[int], level: int) -> None:
    plan, offsets = make_plan(20, 40, 16, 32768), offsets_of(lengths)
    d, a = normal(n_tokens, 20), normal(n_tokens, 40)
    out = torch.full((len(lengths), 32768), 7.0)
    sketch_linear(d, a, offsets, plan, out)
    sketch_embedding(a, torch.zeros(n_tokens, dtype=torch.int64), offsets, plan, out)
    assert (out == 7).all()
    for dtype in (torch.float32, torch.float64):
        x = a.to(dtype)
        weight, bias = norm_grad(x, x, offsets, 1e-6, centered=True, with_bias=True)
        assert bias is not None and not weight.any() and not bias.any() and not bias_grad(x, offsets).any()
        assert weight.shape == bias.shape == bias_grad(x, offsets).shape == (len(lengths), 40)


# ------------------------------------------------------------------------------------------------- folds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols, width", [(17, 16), (127, 16), (513, 64), (1000, 128), (600, 512)], ids=str)
def test_folds_within_rounding(cols: int, width: int, dtype: torch.dtype, level: int, poison: None) -> None:
    x, sizes = normal(35, cols, dtype=dtype), normal(35, cols, dtype=dtype).abs()
    for role, fold in (("linear", fold_inputs), ("tied", fold_outputs)):
        shape = (5, cols) if role == "linear" else (cols, 5)
        plan = make_plan(*shape, width, 32768, role)
        eye = torch.eye(cols, dtype=torch.float64)
        matrix = fold(eye, plan, backend="reference")  # the fold as a matrix of -1, 0 and 1, in float64
        got = fold(x, plan, backend="cpu")
        assert got.shape == (35, width) and got.dtype == dtype
        exact, size = x.double() @ matrix, sizes.double() @ matrix.abs()
        bound = sum_error_bound(size, -(-cols // width)) + sum_error_bound(size, 1, dtype)
        assert ((got - exact).abs() <= bound).all()
        same = make_plan(*shape, None, 32768, role)
        assert fold(x, same) is x, "no fold, no copy"


# --------------------------------------------------------------------------------------- sketch_embedding
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ["embedding", "tied", "linear"])
@pytest.mark.parametrize("rows, cols, dim", [(1, 1, 32768), (1000, 7, 65536), (300, 513, 131072)], ids=str)
def test_sketch_embedding_within_rounding(
    role: str, rows: int, cols: int, dim: int, dtype: torch.dtype, level: int, poison: None
) -> None:
    plan, offsets = make_plan(rows, cols, 64, dim, role), offsets_of([1, 0, 40, 300])
    x = normal(341, cols, seed=3, dtype=dtype)
    index = torch.randint(0, rows, (341,), generator=torch.Generator().manual_seed(0))
    index[50:90] = index[50]  # one row, again and again
    out, exact = blank(4, plan), blank(4, plan).double()
    size = exact.clone()
    sketch_embedding(x, index, offsets, plan, out, backend="cpu")
    bucket, sign = (m.reshape(-1) for m in coordinates(plan))
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        for target, values, factor in ((exact, x, sign), (size, x.abs(), sign.abs())):
            gradient = torch.zeros(rows, cols, dtype=torch.float64)
            gradient.index_add_(0, index[begin:end], values[begin:end].double())
            target[s].index_add_(0, bucket, gradient.reshape(-1) * factor)
    # Of a row, any token may add to a bucket.
    depth = 2 + 300 * plan.n_col_blocks + -(-cols // plan.folded_cols)
    bound = sum_error_bound(size, depth)
    if plan.col_fold is not None:
        bound += sum_error_bound(size, 1, dtype)
    assert ((out - exact).abs() <= bound).all() and out[2:].any(dim=1).all()
    wide = exact.clone().zero_()
    sketch_embedding(x.double(), index, offsets, plan, wide)
    assert ((wide - exact).abs() <= bound * 1e-8).all()


# ------------------------------------------------------------------------------------ norms, biases, vectors
@pytest.mark.parametrize("dtypes", [(x, y) for x in DTYPES for y in (x, torch.float32)], ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("n", [1, 7, 64, 513])
def test_norm_and_bias_gradients_within_rounding(
    n: int, centered: bool, dtypes: tuple[torch.dtype, torch.dtype], level: int, poison: None
) -> None:
    offsets = offsets_of(LENGTHS)
    tokens = int(offsets[-1])
    x, dy = 3 * normal(tokens, n, seed=1, dtype=dtypes[0]) + 2, normal(tokens, n, seed=2, dtype=dtypes[1])
    x[5] *= 1e-3  # eps matters here
    weight, bias = norm_grad(x, dy, offsets, 1e-5, centered=centered, with_bias=True, backend="cpu")
    wide = x.double()
    exact = norm_grad(
        wide, dy.double(), offsets, 1e-5, centered=centered, with_bias=True, backend="reference"
    )
    mean = wide.mean(1, keepdim=True) if centered else torch.zeros(tokens, 1)
    scale = ((wide - mean).square().mean(1, keepdim=True) + 1e-5).rsqrt()
    size = ((wide - mean).abs() + mean.abs()) * scale * dy.double().abs()
    # Tokens of a part, parts of a segment, roundings of mean, difference, scale and products.
    depth = 128 + 3 + 5
    assert bias is not None and weight.dtype == bias.dtype == torch.float32
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        assert ((weight[s] - exact[0][s]).abs() <= sum_error_bound(size[begin:end].sum(0), depth)).all()
        bound = sum_error_bound(dy[begin:end].double().abs().sum(0), depth)
        assert ((bias[s] - exact[1][s]).abs() <= bound).all()  # type: ignore[index]
    assert torch.equal(bias_grad(dy, offsets), bias)


def test_norm_statistics_survive_a_large_mean(level: int) -> None:
    """A mean 1e4 times the spread leaves float32 statistics with few digits; they are taken in float64."""
    x, dy = normal(9, 300, seed=1) + 1e4, normal(9, 300, seed=2)
    weight, _ = norm_grad(x, dy, torch.tensor([0, 9]), 1e-5, centered=True)
    wide = x.double(), dy.double()
    exact, _ = norm_grad(*wide, torch.tensor([0, 9]), 1e-5, centered=True, backend="reference")
    # (x - mean) is exact to the rounding of the mean itself: 1e4 * 2^-24 for each of nine terms
    assert float((weight - exact).abs().max()) <= 9 * float(dy.abs().max()) * (1e4 * 2**-24 + 9 * 4 * 2**-24)


@pytest.mark.parametrize("size, dim", [(1, 32768), (9, 64), (513, 1024), (40000, 131072)], ids=str)
def test_sketch_vector_is_its_plan(size: int, dim: int) -> None:
    spec = SketchSpec(kind="countsketch" if dim < 32768 else "slab", dim=dim)
    plan, x = plan_vector(spec, "model.norm.weight", size), normal(3, size)
    out = torch.zeros(3, spec.base_dim)
    sketch_vector(x, plan, out)
    exact, magnitude = np.zeros(out.shape), np.zeros(out.shape)
    np.add.at(exact, (slice(None), plan.position), x.double().numpy() * plan.sign)
    np.add.at(magnitude, (slice(None), plan.position), x.double().abs().numpy())
    bound = sum_error_bound(torch.from_numpy(magnitude), 1 + -(-size // min(spec.base_dim, 32768)))
    assert ((out - torch.from_numpy(exact)).abs() <= bound).all()


# --------------------------------------------------------------------- strides, bits, threads, neighbours
def every_op(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, width: int | None
) -> list[torch.Tensor]:
    """What each op gives for tokens with output gradients ``d`` [n, 40] and inputs ``a`` [n, 300]."""
    plan, n = make_plan(40, 300, width, 65536), offsets.numel() - 1
    linear, rows = blank(n, plan), blank(n, plan)
    sketch_linear(d, a, offsets, plan, linear, backend="cpu")
    index = torch.arange(d.shape[0]) * 7 % 40
    sketch_embedding(a, index, offsets, plan, rows, backend="cpu")
    weight, bias = norm_grad(a, a.flip(1), offsets, 1e-6, centered=True, with_bias=True, backend="cpu")
    assert bias is not None
    vector = plan_vector(SketchSpec(), "model.norm.weight", 300)
    return [linear, rows, weight, bias, sketch_vector(weight, vector, torch.zeros(n, 32768))]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_no_bit(view: str, dtype: torch.dtype) -> None:
    d, a, offsets = (
        normal(90, 40, seed=1, dtype=dtype),
        normal(90, 300, seed=2, dtype=dtype),
        offsets_of([30, 60]),
    )
    strided = VIEWS[view](d), VIEWS[view](a)
    for x, y in zip(strided, (d, a)):
        assert torch.equal(x, y) and (x.stride() != y.stride() or x.storage_offset())
    plan = make_plan(40, 300, 16, 65536)
    want, got = blank(2, plan), blank(2, plan)
    sketch_linear(d, a, offsets, plan, want)
    sketch_linear(*strided, offsets, plan, got)
    assert torch.equal(got, want)
    index, results = torch.arange(90) % 40, []
    for x in (a, strided[1]):
        out = blank(2, plan)
        sketch_embedding(x, index, offsets, plan, out)
        results.append([out, *norm_grad(x, x, offsets, 1e-6, centered=False, with_bias=True)])
    assert all(torch.equal(x, y) for x, y in zip(*results))  # type: ignore[arg-type]


def test_one_row_for_all_tokens() -> None:
    """An expanded tensor has row stride 0, as the output gradient of a sum has."""
    plan, offsets = make_plan(40, 300, 16, 65536), offsets_of([30, 60])
    d, a = normal(1, 40, seed=1).expand(90, 40), normal(1, 300, seed=2).expand(90, 300)
    want, got = blank(2, plan), blank(2, plan)
    sketch_linear(d.clone(), a.clone(), offsets, plan, want)
    sketch_linear(d, a, offsets, plan, got)
    assert torch.equal(got, want) and torch.equal(bias_grad(d, offsets), bias_grad(d.clone(), offsets))


@pytest.mark.parametrize("width", [None, 16])
def test_threads_change_no_bit(width: int | None, level: int) -> None:
    d, a = normal(700, 40, seed=1), normal(700, 300, seed=2)
    offsets, results = offsets_of([300, 0, 1, 399]), []
    for n_threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(n_threads)
        results.append(every_op(d, a, offsets, width))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("cols, width", [(300, 16), (4096, None)], ids=str)
def test_neighbours_change_no_bit(cols: int, width: int | None, level: int) -> None:
    """A segment alone, and among others. Without a fold, 4096 inputs are worked off in phases of 512 tokens."""
    lengths = [300, 700, 0, 100, 257]
    plan, offsets = make_plan(24, cols, width, 32768), offsets_of(lengths)
    d, a = normal(int(offsets[-1]), 24, seed=1), normal(int(offsets[-1]), cols, seed=2)
    together = blank(5, plan)
    sketch_linear(d, a, offsets, plan, together)
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        alone = blank(1, plan)
        sketch_linear(d[begin:end].clone(), a[begin:end].clone(), torch.tensor([0, end - begin]), plan, alone)
        assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("width", [None, 16])
def test_a_bad_token_stays_in_its_segment(bad: float, width: int | None, level: int) -> None:
    d, a, offsets = normal(300, 40, seed=1), normal(300, 300, seed=2), offsets_of([100, 60, 140])
    clean = every_op(d, a, offsets, width)
    for tensor in (d, a):
        before = tensor[130, 7].clone()
        tensor[130, 7] = bad
        for want, got in zip(clean, every_op(d, a, offsets, width)):
            assert torch.equal(want[[0, 2]], got[[0, 2]])
        linear = every_op(d, a, offsets, width)[0]
        assert not linear[1].isfinite().all()
        tensor[130, 7] = before
