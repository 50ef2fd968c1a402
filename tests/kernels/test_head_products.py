"""The products with the head in C++, at every instruction-set level: hidden head^T + bias, and dz head.

The bound: a float32 sum of n products in any order is within n * 2^-24 of the exact one, relative to the sum of their
absolute values.
"""

from __future__ import annotations

import pytest
import torch

from cropi_kernels.ops.linear_logprob import cpu

EPS = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Into a wider buffer of NaN: nothing may be left unwritten, nothing beyond the vocabulary written."""
    vocab = head.shape[0]
    buffer = torch.full((hidden.shape[0], vocab + 3), float("nan"))
    cpu.logits(hidden, head, bias, buffer[:, :vocab])
    assert buffer[:, vocab:].isnan().all()
    return buffer[:, :vocab]


def times(dz: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    wide = torch.full((dz.shape[0], dz.shape[1] + 5), float("nan"))
    wide[:, : dz.shape[1]] = dz
    out = torch.full((dz.shape[0], head.shape[1]), float("nan"), dtype=head.dtype)
    cpu.times_head(wide[:, : dz.shape[1]], head, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 11, 33])
@pytest.mark.parametrize(
    ("features", "vocab"), [(1, 1), (7, 47), (33, 48), (192, 49), (193, 193), (64, 1003), (400, 385)]
)
def test_products_match_float64(
    level: int, dtype: torch.dtype, tokens: int, features: int, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(features)
    hidden = torch.randn(tokens, features, generator=generator).to(dtype)
    head = torch.randn(vocab, features, generator=generator).to(dtype)
    bias, dz = torch.randn(vocab, generator=generator), torch.randn(tokens, vocab, generator=generator)
    h, w, d = hidden.double(), head.double(), dz.double()
    assert ((logits(hidden, head) - h @ w.t()).abs() <= (features + 2) * EPS * (h.abs() @ w.abs().t())).all()
    terms = h.abs() @ w.abs().t() + bias.abs()
    assert ((logits(hidden, head, bias) - (h @ w.t() + bias)).abs() <= (features + 3) * EPS * terms).all()
    got, want = times(dz, head), d @ w
    terms = d.abs() @ w.abs()
    rounding = torch.finfo(dtype).eps / 2 * want.abs() * 1.01
    if dtype == torch.bfloat16 and level == 4:  # dz is multiplied in bfloat16 where the processor can
        rounding += 2.0**-9 * 1.01 * terms
    assert ((got - want).abs() <= (vocab + 2) * EPS * terms + rounding).all()


def test_error_is_at_most_twice_torchs(level: int) -> None:
    """Long sums: chains of additions are cut and added up, as a good BLAS does."""
    hidden, head, dz = torch.randn(24, 1536), torch.randn(500, 1536), torch.randn(24, 20_000)
    want = hidden.double() @ head.double().t()
    assert (logits(hidden, head) - want).abs().max() <= 2 * (hidden @ head.t() - want).abs().max()
    tall = torch.randn(20_000, 40)
    want = dz.double() @ tall.double()
    assert (times(dz, tall) - want).abs().max() <= 2 * (dz @ tall - want).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_independent_to_the_bit(level: int, dtype: torch.dtype) -> None:
    hidden, head, dz = torch.randn(40, 100).to(dtype), torch.randn(1003, 100).to(dtype), torch.randn(40, 1003)
    z, d = logits(hidden, head), times(dz, head)
    for rows in (slice(0, 1), slice(5, 18), slice(39, 40)):
        assert torch.equal(logits(hidden[rows], head), z[rows]) and torch.equal(
            times(dz[rows], head), d[rows]
        )
    hidden[7], dz[7] = float("nan"), float("inf")
    others = [i for i in range(40) if i != 7]
    z_nan, d_nan = logits(hidden, head), times(dz, head)
    assert z_nan[7].isnan().all() and not d_nan[7].isfinite().any()
    assert torch.equal(z_nan[others], z[others]) and torch.equal(d_nan[others], d[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_bits(level: int, dtype: torch.dtype) -> None:
    hidden, head, dz = torch.randn(65, 70).to(dtype), torch.randn(9001, 70).to(dtype), torch.randn(65, 9001)
    seen = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        seen.append((logits(hidden, head), times(dz, head)))
    assert all(torch.equal(z, seen[0][0]) and torch.equal(d, seen[0][1]) for z, d in seen[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_rows_and_columns(level: int, dtype: torch.dtype) -> None:
    hidden, head, dz = torch.randn(13, 50).to(dtype), torch.randn(301, 50).to(dtype), torch.randn(13, 301)
    z, d = logits(hidden, head), times(dz, head)
    odd = torch.cat([head, head, head[:, :1]], 1)[:, 1:51].copy_(head)  # an odd stride
    for wide in (torch.cat([head, head], 1)[:, :50], head.t().contiguous().t(), odd):
        assert torch.equal(logits(torch.cat([hidden, hidden], 1)[:, 50:], wide), z)
        assert torch.equal(times(dz, wide), d)
