"""rms_norm and swiglu, and their gradients, against float64 within rounding: autograd of the formula is the oracle."""

from __future__ import annotations

import pytest
import torch
from support.tensors import normal

from cropi_kernels import (
    SketchSpec,
    fold_inputs,
    plan_matrix,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from cropi_kernels.testing import sum_error_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 513]
LENGTHS = [1, 0, 127, 129, 3, 0]  # of segments: around the 128 tokens of a part
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
TOKENS, EPS = int(OFFSETS[-1]), 1e-5
BACKENDS = ["cpu", "reference"]


def ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the rounding of a result to its own dtype may change, its smallest numbers included."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2) + info.tiny * info.eps


# --------------------------------------------------------------------------------------------------- norms
def operands(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of several sizes, with eps of weight in one row and a row of zeros, scales and output gradients."""
    x = normal(TOKENS, n, seed=1, dtype=dtype) * 3 + 1
    x[5] *= 1e-3
    x[6] = 0
    return x, normal(n, seed=2, dtype=dtype) + 1, normal(TOKENS, n, seed=3, dtype=dtype)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, dx, gradient of the scale per token) by autograd in float64."""
    x, w = x.double().requires_grad_(), weight.double().expand(x.shape).requires_grad_()
    y = w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_norm_within_rounding(n: int, dtype: torch.dtype, level: int, poisoned: None) -> None:
    for backend in BACKENDS:
        norm_within_rounding(n, dtype, backend)


def norm_within_rounding(n: int, dtype: torch.dtype, backend: str) -> None:
    x, weight, dy = operands(n, dtype)
    exact_y, exact_dx, by_token = exact_norm(x, weight, dy)
    y, scale = rms_norm(x, weight, EPS, backend=backend)
    # Squares, their sums in a block of 256 and beyond, quotient, root, two products: half of those of the sum count.
    depth = 30
    assert y.dtype == dtype and scale.dtype == torch.float32
    assert ((y - exact_y).abs() <= sum_error_bound(exact_y.abs(), depth) + ulp(exact_y, dtype)).all()
    dx, sums = rms_norm_backward(dy, x, weight, scale, OFFSETS, backend=backend)
    g, xhat = (dy * weight.double()).abs(), x.double().abs() * scale.double()[:, None]
    size = scale.double()[:, None] * (g + xhat * (g * xhat).mean(1, keepdim=True))
    assert sums is not None and dx.dtype == dtype and sums.dtype == torch.float32
    assert ((dx - exact_dx).abs() <= sum_error_bound(size, 2 * depth) + ulp(exact_dx, dtype)).all()
    for s, (begin, end) in enumerate(zip(OFFSETS.tolist(), OFFSETS.tolist()[1:])):
        bound = sum_error_bound(by_token[begin:end].abs().sum(0), 130 + depth)
        assert ((sums[s] - by_token[begin:end].sum(0)).abs() <= bound).all()
    # All tokens in one segment are three parts.
    _, whole = rms_norm_backward(dy, x, weight, scale, torch.tensor([0, TOKENS]), backend=backend)
    bound = sum_error_bound(by_token.abs().sum(0), TOKENS + depth)
    assert whole is not None and ((whole[0] - by_token.sum(0)).abs() <= bound).all()
    alone, nothing = rms_norm_backward(dy, x, weight, scale, backend=backend)
    assert nothing is None and torch.equal(alone, dx), "the sums change no bit of dx"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norm_is_as_near_as_eager_code(dtype: torch.dtype) -> None:
    """Rounded once; code in transformers rounds the normalised row too."""
    x, weight, dy = operands(513, dtype)
    exact = exact_norm(x, weight, dy)[:2]
    leaf = x.clone().requires_grad_()
    wide = leaf.float()
    eager = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype)
    (eager_dx,) = torch.autograd.grad(eager, leaf, dy)
    y, scale = rms_norm(x, weight, EPS)
    dx, _ = rms_norm_backward(dy, x, weight, scale)
    for got, own, want in zip((y, dx), (eager, eager_dx), exact, strict=True):
        assert float((got - want).norm()) <= float((own.detach() - want).norm()) > 0


def test_norm_in_float64_is_the_oracle() -> None:
    x, weight, dy = (t.double() for t in operands(33, torch.float32))
    y, scale = rms_norm(x, weight, EPS, backend="reference")
    dx, sums = rms_norm_backward(dy, x, weight, scale, OFFSETS, backend="reference")
    want = exact_norm(x, weight, dy)
    assert sums is not None and y.dtype == dx.dtype == sums.dtype == torch.float64
    torch.testing.assert_close((y, dx, sums.sum(0)), (*want[:2], want[2].sum(0)), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------- swiglu
def gates(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates from -130 to 130: exponentials that overflow and vanish."""
    gate = normal(20, n, seed=4, dtype=dtype) * 3
    gate[3], gate[4], gate[5, :1] = -130, 130, 0
    return gate, normal(20, n, seed=5, dtype=dtype), normal(20, n, seed=6, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_swiglu_within_rounding(n: int, dtype: torch.dtype, level: int, poisoned: None) -> None:
    for backend in BACKENDS:
        swiglu_within_rounding(n, dtype, backend)


def swiglu_within_rounding(n: int, dtype: torch.dtype, backend: str) -> None:
    gate, up, dh = gates(n, dtype)
    z, u = gate.double().requires_grad_(), up.double().requires_grad_()
    want = torch.nn.functional.silu(z) * u
    dz, du = torch.autograd.grad(want, (z, u), dh.double())
    h, folded = swiglu(gate, up, backend=backend)
    dgate, dup = swiglu_backward(dh, gate, up, backend=backend)
    s = torch.sigmoid(z.detach())
    # Of the slope s (1 + z (1 - s)) the terms count, which may cancel.
    slope = (dh.double() * up.double()).abs() * (s + s * (1 - s) * z.detach().abs())
    depth = 10  # exponential (3), sum, quotient, products
    assert folded is None and h.dtype == dgate.dtype == dup.dtype == dtype
    # Below exp(-87) float32 has no more normal numbers: what is left there is 130 exp(-87) at most.
    lost = 130 * 2.0**-125 * (dh.double().abs() + 1) * (up.double().abs() + 1)
    for got, exact, size in ((h, want.detach(), want.detach()), (dgate, dz, slope), (dup, du, du)):
        bound = sum_error_bound(size.abs(), depth) + ulp(exact, dtype) + lost
        assert ((got - exact).abs() <= bound).all(), float((got - exact).abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fold_has_the_bits_of_fold_inputs(dtype: torch.dtype, backend: str) -> None:
    plan = plan_matrix(SketchSpec(width=16), "model.layers.0.mlp.down_proj.weight", 20, 70)
    gate, up, _ = gates(70, dtype)
    h, folded = swiglu(gate, up, plan, backend=backend)
    assert folded is not None and torch.equal(folded, fold_inputs(h, plan, backend=backend)) and folded.any()


# ---------------------------------------------------------------------------------------------- both alike
def everything(tensors: tuple[torch.Tensor, ...], offsets: torch.Tensor) -> list[torch.Tensor]:
    """All results for x, weight, dy of one dtype."""
    x, weight, dy = tensors
    y, scale = rms_norm(x, weight, EPS)
    dx, sums = rms_norm_backward(dy, x, weight, scale, offsets)
    assert sums is not None
    return [y, scale, dx, sums, swiglu(x, dy)[0], *swiglu_backward(dy, x, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_threads_change_no_bit(dtype: torch.dtype, level: int) -> None:
    x, weight, dy = operands(70, dtype)
    want = everything((x, weight, dy), OFFSETS)
    rows_apart = torch.cat([x, x], 1)[:, :70], torch.stack([weight, weight], 1)[:, 0], dy.T.contiguous().T
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        for tensors in ((x, weight, dy), rows_apart):
            assert all(map(torch.equal, everything(tensors, OFFSETS), want))


def test_a_bad_token_stays_in_its_row_and_segment() -> None:
    x, weight, dy = operands(70, torch.float32)
    clean = everything((x, weight, dy), OFFSETS)
    x[40, 3] = float("nan")  # of the third segment
    got = everything((x, weight, dy), OFFSETS)
    for name, before, after in zip(
        ("y", "scale", "dx", "sums", "h", "dgate", "dup"), clean, got, strict=True
    ):
        broken = (before != after) | after.isnan()
        rows = broken.any(1) if broken.ndim == 2 else broken
        assert rows.nonzero().flatten().tolist() == [2 if name == "sums" else 40], name
        assert after.isnan().any()


@pytest.mark.parametrize("tokens, n", [(0, 5), (3, 0), (1, 1)], ids=str)
def test_nothing_to_compute(tokens: int, n: int) -> None:
    x = torch.ones(tokens, n)
    offsets = torch.tensor([0, 0, tokens])
    for backend in BACKENDS:
        y, scale = rms_norm(x, torch.ones(n), EPS, backend=backend)
        dx, sums = rms_norm_backward(x, x, torch.ones(n), scale, offsets, backend=backend)
        assert sums is not None and (y.shape, dx.shape, sums.shape) == (x.shape, x.shape, (2, n))
        assert not sums[0].any() and swiglu(x, x, backend=backend)[0].shape == x.shape
        assert swiglu_backward(x, x, x, backend=backend)[1].shape == x.shape


def test_what_is_wrong_is_named() -> None:
    x, weight, dy = operands(8, torch.float32)
    scale = rms_norm(x, weight, EPS)[1]
    full = plan_matrix(SketchSpec(width=None), "a.mlp.down_proj.weight", 4, 8)
    cases = {
        "x has shape": lambda: rms_norm(x[0], weight, EPS),
        "weight is torch.float32 (7,)": lambda: rms_norm(x, weight[:7], EPS),
        "weight is torch.bfloat16": lambda: rms_norm(x, weight.bfloat16(), EPS),
        "dy is torch.float16": lambda: rms_norm_backward(dy.half(), x, weight, scale),
        "scale is torch.float64": lambda: rms_norm_backward(dy, x, weight, scale.double()),
        "offsets run from 1": lambda: rms_norm_backward(dy, x, weight, scale, OFFSETS.clamp(min=1)),
        "every token must be in a segment": lambda: rms_norm_backward(dy, x, weight, scale, OFFSETS[:-3]),
        "is below offsets": lambda: rms_norm_backward(dy, x, weight, scale, OFFSETS.flip(0)),
        "gate has shape": lambda: swiglu(x[0], x[0]),
        "up is torch.float64": lambda: swiglu(x, x.double()),
        "dh is torch.float32 (1, 8)": lambda: swiglu_backward(x[:1], x, x),
        "gate is torch.int64": lambda: swiglu(OFFSETS[None], OFFSETS[None]),
        "folds no inputs": lambda: swiglu(x, x, full),
        "must be [tokens, 40]": lambda: swiglu(x, x, plan_matrix(SketchSpec(width=16), "a.weight", 4, 40)),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value), (words, str(error.value))
