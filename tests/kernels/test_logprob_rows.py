"""The row kernels of linear_logprob on given logits, at every instruction-set level, against float64."""

from __future__ import annotations

from math import log

import pytest
import torch

from cropi_kernels.ops.linear_logprob import cpu, reference
from cropi_kernels.ops.linear_logprob.contract import RowMath, Stats

EPS = 2.0**-24
PLAIN = RowMath(1.0, 0.0)


def run(z: torch.Tensor, target: torch.Tensor, math: RowMath = PLAIN, rows=cpu) -> Stats:
    n = z.shape[0]
    stats = Stats(*(torch.full((n,), float("nan")) for _ in range(4)))
    rows.forward(z, target, math, stats)
    return stats


def gradient(
    z: torch.Tensor, target: torch.Tensor, g: torch.Tensor, math: RowMath = PLAIN, rows=cpu
) -> torch.Tensor:
    out = z.clone()
    rows.backward(out, target, g, math, run(z, target, math, rows))
    return out


def exact(z: torch.Tensor, target: torch.Tensor, math: RowMath) -> tuple[torch.Tensor, ...]:
    """logp, 1 - p of the target, softmax, entropy and slope of the cap in float64; no cancellation in 1 - p."""
    a = z.double()
    slope = torch.ones_like(a)
    if math.softcap:
        a, slope = math.softcap * torch.tanh(a / math.softcap), torch.cosh(a / math.softcap) ** -2
    x = (a - a.max(dim=-1, keepdim=True).values) / math.temperature
    own = x.gather(1, target[:, None])
    rest = x.exp().scatter(1, target[:, None], 0.0).sum(dim=-1, keepdim=True)
    logp = torch.where(own == 0, -rest.log1p(), own - (own.exp() + rest).log())
    p = torch.softmax(x, dim=-1)
    terms = torch.where(p > 0, p * torch.log_softmax(x, dim=-1), 0.0)
    return logp[:, 0], (rest / (own.exp() + rest))[:, 0], p, -terms.sum(dim=-1), slope


def test_exponential_within_two_ulp(level: int) -> None:
    """With logits (0, x) and target 0, -expm1(-logp) is exp(x): the kernel's exponential is all that is between."""
    x = torch.cat([-torch.logspace(-6, 1.94, 200_001), torch.linspace(-87.3, 0, 200_001)])
    z = torch.stack([torch.zeros_like(x), x], dim=1)
    logp = run(z, torch.zeros(x.shape[0], dtype=torch.int64)).logp.double()
    error = (torch.expm1(-logp) / x.double().exp() - 1).abs()
    # 2 ulp of the exponential, and half an ulp of logp = -log1p(e) in float32, magnified by at most 1.39
    assert error.max() <= (4 + 1.39) * EPS
    assert error.mean() <= 1.0 * EPS


@pytest.mark.parametrize("vocab", [1, 2, 15, 127, 129, 1003, 1024, 1025, 50257])
@pytest.mark.parametrize("math", [PLAIN, RowMath(0.7, 0.0), RowMath(1.3, 30.0)], ids=str)
def test_rows_match_float64(level: int, vocab: int, math: RowMath) -> None:
    generator = torch.Generator().manual_seed(vocab)
    z = torch.randn(7, vocab, generator=generator) * torch.tensor([0.1, 1, 3, 10, 30, 1, 1])[:, None]
    target = torch.randint(0, vocab, (7,), generator=generator)
    target[5], target[6] = 0, vocab - 1
    g = torch.randn(7, generator=generator)
    logp, one_minus_p, p, entropy, slope = exact(z, target, math)
    got = run(z, target, math)
    # x = (z - top) / temperature carries 3 roundings (5 more through the cap); a sum of V terms in blocks about 64.
    spread = (z.max(dim=-1).values - z.min(dim=-1).values).double() / math.temperature
    bound = EPS * (64 + 8 * spread)
    assert ((got.logp - logp).abs() <= bound).all()
    assert ((got.entropy - entropy).abs() <= bound * (1 + spread)).all()
    capped = z.double() if not math.softcap else math.softcap * torch.tanh(z.double() / math.softcap)
    lse = torch.logsumexp(capped / math.temperature, dim=-1)
    got_lse = got.top.double() / math.temperature + got.log_sum
    assert ((got_lse - lse).abs() <= bound + 4 * EPS * lse.abs()).all()
    d = (
        p.scatter(1, target[:, None], -one_minus_p[:, None]) * -(g.double() / math.temperature)[:, None]
    ) * slope
    error = (gradient(z, target, g, math) - d).abs()
    assert (error <= d.abs() * (bound[:, None] + 32 * EPS) + 2.0**-120).all(), float(error.max())


@pytest.mark.parametrize("missing", [1e-1, 1e-3, 1e-6, 1e-9, 1e-20])
def test_confident_target_keeps_its_bits(level: int, missing: float) -> None:
    """logp and the gradient of a target with p = 1 - missing, to a relative error: softmax - 1 would have none left."""
    z = torch.zeros(3, 1003)
    target = torch.tensor([0, 500, 1002])
    z.scatter_(1, target[:, None], -log(missing / 1002))
    g = torch.tensor([1.0, -2.0, 0.5])
    logp, one_minus_p, _, _, _ = exact(z, target, PLAIN)
    got = run(z, target).logp
    assert ((got / logp - 1).abs() <= 40 * EPS).all()
    assert (got <= 0).all()
    own = gradient(z, target, g).gather(1, target[:, None])[:, 0]
    assert ((own / (g * one_minus_p) - 1).abs() <= 40 * EPS).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset_changes_nothing(level: int, offset: float) -> None:
    z = torch.randint(-640, 640, (5, 1003)).float() / 64  # stays exact when 1e4 is added
    target = torch.randint(0, 1003, (5,))
    plain, moved = run(z, target), run(z + offset, target)
    assert torch.equal(plain.logp, moved.logp) and torch.equal(plain.entropy, moved.entropy)
    assert torch.equal(plain.top + offset, moved.top)
    assert torch.equal(gradient(z, target, torch.ones(5)), gradient(z + offset, target, torch.ones(5)))


def test_infinities(level: int) -> None:
    inf = float("inf")
    z = torch.randn(5, 2100)
    target = torch.tensor([3, 3, 3, 2050, 3])
    z[0, :1500] = -inf  # a masked vocabulary, wider than a block; the target is masked too
    z[1, 5:] = -inf
    z[2] = -inf
    z[3, 7] = inf
    got, wanted = run(z, target), torch.log_softmax(z.double(), -1).gather(1, target[:, None])[:, 0]
    assert got.logp[0] == -inf and wanted[0] == -inf
    assert abs(got.logp[1] - wanted[1]) < 16 * EPS * 8
    assert got.logp[2:4].isnan().all() and wanted[2:4].isnan().all()
    assert abs(got.logp[4] - wanted[4]) < 64 * EPS * 8
    assert got.entropy[:2].isfinite().all()
    d = gradient(z, target, torch.ones(5))
    assert (d[0, :3] == 0).all() and (d[0, 4:1500] == 0).all() and d[0, 3] == 1
    assert d[1, 5:].eq(0).all() and d[1].isfinite().all()


@pytest.mark.parametrize("place", [0, 700, 1023, 1024, 2099])
@pytest.mark.parametrize("math", [PLAIN, RowMath(1.0, 5.0)], ids=str)
def test_nan_stays_in_its_row(level: int, place: int, math: RowMath) -> None:
    z = torch.randn(3, 2100)
    target = torch.tensor([5, 700, 2099])
    clean, clean_d = run(z, target, math), gradient(z, target, torch.ones(3), math)
    z[1, place] = float("nan")
    got, d = run(z, target, math), gradient(z, target, torch.ones(3), math)
    assert got.logp[1].isnan() and got.log_sum[1].isnan() and got.entropy[1].isnan() and d[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(got.logp[row], clean.logp[row]) and torch.equal(d[row], clean_d[row])
    assert (gradient(z, target, torch.tensor([1.0, 0.0, 1.0]), math)[1] == 0).all()


def test_rows_without_gradient_or_target_are_zero(level: int) -> None:
    z, target = torch.randn(4, 1003), torch.tensor([3, -1, 0, 1002])
    d = gradient(z, target, torch.tensor([0.0, 1.0, -0.0, 2.0]))
    assert (d[:3] == 0).all() and (d[3] != 0).all()
    got = run(z, target)
    assert got.logp[1] == 0
    assert abs(got.log_sum[1] + got.top[1] - torch.logsumexp(z[1].double(), 0)) < 100 * EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(level: int, dtype: torch.dtype) -> None:
    """16-bit logits are exact numbers: only the gradient, written back in 16 bits, is rounded."""
    z = (torch.randn(5, 1100) * 3).to(dtype)
    target, g = torch.randint(0, 1100, (5,)), torch.randn(5)
    logp, one_minus_p, p, _, _ = exact(z, target, PLAIN)
    assert ((run(z, target).logp - logp).abs() <= EPS * 300).all()
    d = p.scatter(1, target[:, None], -one_minus_p[:, None]) * -g.double()[:, None]
    error = (gradient(z, target, g).double() - d).abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert (error <= d.abs() * half_ulp * 1.01 + torch.finfo(dtype).smallest_normal * half_ulp).all()


def test_threads_do_not_change_bits(level: int) -> None:
    z, target, g = torch.randn(65, 20011), torch.randint(0, 20011, (65,)), torch.randn(65)
    seen = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        seen.append((run(z, target), gradient(z, target, g)))
    for stats, d in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stats, seen[0][0])) and torch.equal(d, seen[0][1])


def test_rows_further_apart_than_32_bits(level: int) -> None:
    """Offsets past 2^31 elements; the memory between the rows is reserved and never touched."""
    z = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 100), (2**31, 1))
    z.copy_(torch.randn(2, 100))
    target = torch.tensor([1, 99])
    assert torch.equal(run(z, target).logp, run(z.contiguous(), target).logp)
    wanted = gradient(z.contiguous(), target, torch.ones(2))
    cpu.backward(z, target, torch.ones(2), PLAIN, run(z, target))
    assert torch.equal(z, wanted)


@pytest.mark.parametrize("math", [PLAIN, RowMath(0.7, 30.0)], ids=str)
def test_torch_rows_keep_the_same_contract(math: RowMath) -> None:
    """The plain-torch rows that serve other devices, on the same hard cases."""
    z = torch.randn(6, 1003) * 3
    target = torch.tensor([5, 0, 1002, -1, 7, 9])
    z[4, 7] = 40.0
    z[5, 3] = float("nan")
    g = torch.tensor([1.0, -1.0, 0.0, 1.0, 2.0, 0.0])
    got, wanted = run(z, target, math, reference), run(z, target, math)
    assert torch.equal(got.top[:5], wanted.top[:5]) or math.softcap  # of a row with NaN it means nothing
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a[:5], b[:5], rtol=3e-6, atol=3e-6)
    assert got.logp[5].isnan() and got.log_sum[5].isnan() and got.entropy[5].isnan()
    a, b = gradient(z, target, g, math, reference), gradient(z, target, g, math)
    torch.testing.assert_close(a, b, rtol=3e-5, atol=1e-12)
    assert (a[[2, 3, 5]] == 0).all()
