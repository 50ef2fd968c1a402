"""norm_grad, bias_grad and linear_logprob in Triton against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton.language as tl
from rehearsal import INTERPRETER

from cropi_kernels import bias_grad, linear_logprob, logprob_and_grad, norm_grad
from cropi_kernels.ops import _triton_segments
from cropi_kernels.ops.linear_logprob import oracle
from cropi_kernels.ops.linear_logprob.contract import RowMath, Stats
from cropi_kernels.ops.linear_logprob.triton import DeviceKernels
from cropi_kernels.ops.norm_grad import triton as kernels
from cropi_kernels.testing import sum_error_bound


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("n", [1, 24, 576, 1003])
def test_norm_grad(n: int, centered: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, dy = torch.randn(300, n, generator=g) + 3, torch.randn(300, n, generator=g)
    offsets = torch.tensor([1, 5, 5, 290])
    got = norm_grad(x, dy, offsets, 1e-6, centered=centered, with_bias=True, backend="triton")
    wide, how = (x.double(), dy.double()), {"centered": centered, "with_bias": True, "backend": "reference"}
    exact, sizes = (norm_grad(wide[0], g, offsets, 1e-6, **how) for g in (wide[1], wide[1].abs()))
    for value, right, size in zip(got, exact, sizes):
        assert value is not None and right is not None and size is not None
        # the statistics of a row are sums of n terms of size up to |x|
        slack = sum_error_bound(size.abs() + 4 * 285**0.5, 285 + 4 * n + 20)
        assert ((value.double() - right).abs() <= slack).all()
    bias = bias_grad(dy, offsets, backend="triton")
    assert sizes[1] is not None and exact[1] is not None
    assert ((bias.double() - exact[1]).abs() <= sum_error_bound(sizes[1], 285)).all()


@pytest.mark.skipif(not INTERPRETER, reason="the constant is compiled in")
def test_more_programs_than_a_second_axis_has(monkeypatch: pytest.MonkeyPatch) -> None:
    dy, offsets = torch.randn(70, 1100), torch.tensor([0, 3, 3, 70])
    want = bias_grad(dy, offsets, backend="triton")
    # For 18 blocks of sums, 3 of what is added up.
    monkeypatch.setattr(_triton_segments, "SECOND", tl.constexpr(2))
    assert _triton_segments.along_second(3) == (2, 2)
    assert torch.equal(bias_grad(dy, offsets, backend="triton"), want)
    exact = torch.stack([dy.double()[a:b].sum(0) for a, b in zip(offsets, offsets[1:])])
    assert (want - exact).abs().max() <= sum_error_bound(dy.abs().sum(0).max(), 67)


def stats(n: int, entropy: bool = True) -> Stats:
    return Stats(*(torch.empty(n) for _ in range(3)), torch.empty(n) if entropy else None)


@pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab", [1, 127, 1003, 9000])
def test_rows_against_the_formula(vocab: int, softcap: float) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, vocab, generator=g) * 6 + torch.tensor(
        [[0.0], [1e4 if softcap == 0 else 20], [-50], [3], [0]]
    )
    if vocab > 1:
        z[3, 1:] -= 14.0  # confident
    target = torch.tensor([vocab - 1, 0, vocab // 2, 0, -1])
    grad, math, got = torch.randn(5, generator=g), RowMath(0.7, softcap), stats(5)
    buffer = torch.full((5, vocab + 7), float("nan"))
    buffer[:, :vocab] = z
    view = buffer[:, :vocab]
    kernels = DeviceKernels(torch.float32)
    kernels.forward(view, target, math, got)
    hidden, head = torch.eye(5, dtype=torch.float64), z.double().t()
    named = target.where(target >= 0, -100)
    cap = softcap or None
    right = oracle.linear_logprob(hidden, head, named, temperature=0.7, softcap=cap)
    scale = z.abs().amax(1).double() if softcap == 0 else torch.full((5,), 30.0, dtype=torch.float64)
    slack = 2e-6 * (1 + (right.logp.abs())) + 2.0**-22 * scale / 0.7
    assert got.entropy is not None
    assert ((got.logp.double() - right.logp).abs() <= slack).all()
    assert ((got.entropy.double() - right.entropy)[target >= 0].abs() <= 40 * slack[target >= 0]).all()
    assert (got.logp <= 0).all()
    if vocab > 1:  # 1 - p of the confident row, to relative precision
        p = torch.expm1(right.logp[3])
        assert abs(float(torch.expm1(got.logp[3].double()) / p) - 1) < 1e-4
    dz = kernels.backward(view, target, grad, math, got)
    exact, _ = oracle.gradients(grad.double(), hidden, head, named, temperature=0.7, softcap=cap)
    assert dz.data_ptr() == buffer.data_ptr() and (dz[4] == 0).all()
    assert (
        (dz.double() - exact).abs()
        <= (4e-6 + slack[:, None]) * (exact.abs() + 1e-6 + exact.abs().amax(1, True))
    ).all()


def test_half_width_gradient_in_the_logits_own_memory(half: torch.dtype) -> None:
    z = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    target, grad, math = torch.tensor([1, 8999, 5]), torch.tensor([1.0, -2.0, 0.0]), RowMath(1.0, 0.0)
    got = stats(3, entropy=False)
    DeviceKernels(torch.float32).forward(z, target, math, got)
    wide = DeviceKernels(torch.float32).backward(z.clone(), target, grad, math, got)
    short = DeviceKernels(half).backward(z, target, grad, math, got)
    assert short.data_ptr() == z.data_ptr() and torch.equal(short, wide.to(half))


def test_rows_that_do_not_count_and_rows_that_are_broken() -> None:
    z = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    z[1, 7], z[2, 3] = float("nan"), float("-inf")
    target, math, got = torch.tensor([3, 3, 3, 50, -1]), RowMath(1.0, 0.0), stats(5)
    kernels = DeviceKernels(torch.float32)
    kernels.forward(z, target, math, got)
    assert got.logp[0].isfinite() and got.logp[1].isnan() and got.logp[4] == 0
    assert got.logp[2] == float("-inf") and got.logp[3].isnan(), "a target past the vocabulary"
    dz = kernels.backward(z, target, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]), math, got)
    assert (dz[:3] == 0).all() and dz[3].isnan().all() and (dz[4] == 0).all()


def test_a_block_without_a_finite_logit() -> None:
    """What comes before the first finite logit weighs nothing."""
    z = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    z[0, :5000] = float("-inf")
    target, got = torch.tensor([8999, 3]), stats(2)
    DeviceKernels(torch.float32).forward(z, target, RowMath(1.0, 0.0), got)
    right = z.double().log_softmax(1)
    terms = (right.exp() * right).where(right.isfinite(), 0.0)
    assert got.entropy is not None
    torch.testing.assert_close(got.logp.double(), right.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.entropy.double(), -terms.sum(1), rtol=1e-5, atol=0)


def test_the_whole_op() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9, 12, generator=g, requires_grad=True), torch.randn(70, 12, generator=g)
    targets, grad = torch.randint(0, 70, (9,), generator=g), torch.randn(9, generator=g)
    targets[4] = -100
    logp = linear_logprob(hidden, head, targets, chunk_size=4, backend="triton")
    assert isinstance(logp, torch.Tensor)
    (logp * grad).sum().backward()
    right = oracle.linear_logprob(hidden.detach(), head, targets).logp
    _, dhidden = oracle.gradients(grad.double(), hidden.detach(), head, targets)
    torch.testing.assert_close(logp.detach().double(), right, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), dhidden, rtol=1e-4, atol=1e-5)
    seen = []
    result = logprob_and_grad(
        hidden.detach(), head, targets, lambda logp, a, b: grad[a:b], chunk_size=4, backend="triton",
        on_dlogits=lambda a, b, dz: seen.append((a, b, tuple(dz.shape))),
    )  # fmt: skip
    torch.testing.assert_close(result[1].double(), dhidden, rtol=1e-4, atol=1e-5)
    assert seen == [(0, 4, (4, 70)), (4, 8, (4, 70)), (8, 9, (1, 70))]


def test_offsets_that_decrease_touch_only_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device they are not checked. Segments that overlap have more chunks than their tokens have room for."""
    tokens, segments, n, guard, mark, empty = 260, 12, 16, 1 << 12, 1 << 30, torch.empty
    guards = []

    def guarded(*shape: int, **kwargs: Any) -> torch.Tensor:
        size = math.prod(shape)
        memory = empty(size + guard, **kwargs).fill_(7)
        guards.append(memory[size:].fill_(mark))
        return memory[:size].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    x, offsets = torch.ones(tokens, n), torch.tensor([0, tokens] * (segments // 2) + [0])
    sums = torch.zeros(2, segments, n)
    kernels.norm_grad(x, x, offsets, 1e-6, False, *sums)
    assert guards and all((memory == mark).all() for memory in guards)
    assert (sums.abs() < mark / 2).all(), "nor is it read"
