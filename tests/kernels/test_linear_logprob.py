"""linear_logprob and logprob_and_grad against float64: values, gradients, dtypes, errors, tracing, determinism.

Tolerances: a sum of D products in float32, in any order, is within D * 2^-24 * sum |h||w| of the exact one; the rest is
the row kernels' share, tested in test_logprob_rows.py. Where the hidden states are rows of the identity, the logits
are exact and only the row kernels' share is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from cropi_kernels.ops.linear_logprob import chunks, linear_logprob, logprob_and_grad, ops, oracle, reference

EPS = 2.0**-24
pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["cpu", "reference"]


def problem(n: int, d: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    head = torch.randn(vocab, d, generator=generator) * (3 / d**0.5)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    grad = torch.randn(n, generator=generator)
    return hidden, head, targets, grad


def exact_logits(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden, head whose product is ``z`` to the bit."""
    return torch.eye(z.shape[0]), z.t().contiguous()


def logit_bound(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[N] bound on the error of any float32 logit of a token."""
    terms = hidden.abs().double() @ head.abs().double().t()
    return (hidden.shape[1] + 16) * EPS * terms.max(dim=-1).values


def weights_of(grad: torch.Tensor) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    return lambda logp, start, stop: grad[start:stop]


def both(hidden, head, targets, grad, **kwargs):
    """(logp, dhidden) by autograd and by the one-pass function."""
    leaf = hidden.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logp = linear_logprob(leaf, head, targets, **kwargs)
    logp.backward(grad.to(logp.dtype))
    fast, dhidden, weights = logprob_and_grad(hidden, head, targets, weights_of(grad), **kwargs)
    assert torch.equal(weights, grad.to(weights.dtype))
    return (logp.detach(), leaf.grad), (fast, dhidden)


@pytest.mark.parametrize("n", [0, 1, 7, 65])
@pytest.mark.parametrize("vocab", [1, 127, 129, 1003, 50257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(vocab: int, n: int, backend: str) -> None:
    hidden, head, targets, grad = problem(n, 33, vocab)
    if n > 1:
        targets[1] = -100
        grad[0] = 0.0
    want = oracle.linear_logprob(hidden, head, targets)
    dlogits, dhidden = oracle.gradients(grad, hidden, head, targets)
    bound = logit_bound(hidden, head) if n else torch.zeros(0)
    # d of softmax rows: an error b in every logit moves g (onehot - p) by at most 2 b |g| in the 1-norm.
    slack = (2 * bound + 300 * EPS) * grad.abs()
    allowed = 2 * slack[:, None] * head.abs().max() + 100 * EPS * (dlogits.abs() @ head.double().abs())
    for logp, got in both(hidden, head, targets, grad, backend=backend, chunk_size=32):
        assert logp.dtype == torch.float32 and got.dtype == hidden.dtype and got.shape == hidden.shape
        assert (logp <= 0).all()
        assert ((logp - want.logp).abs() <= 2 * bound + 300 * EPS).all()
        assert ((got - dhidden).abs() <= allowed).all()
        if n > 1:
            assert logp[1] == 0 and (got[:2] == 0).all()
    logp, entropy = linear_logprob(hidden, head, targets, return_entropy=True, backend=backend)
    assert entropy.dtype == torch.float32
    assert ((entropy - want.entropy).abs() <= (2 * bound + 300 * EPS) * (1 + want.lse.abs())).all()


@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.6}, {"softcap": 5.0}, {"softcap": 30.0, "temperature": 1.7}], ids=str
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_softcap_bias_twice_torchs_error(
    kwargs: dict[str, float], with_bias: bool, backend: str
) -> None:
    hidden, head, targets, grad = problem(65, 48, 1003)
    bias = torch.randn(1003) if with_bias else None
    leaf = hidden.clone().requires_grad_()
    plain = oracle.linear_logprob(leaf, head, targets, bias=bias, dtype=torch.float32, **kwargs)
    plain.logp.backward(grad)
    want = oracle.linear_logprob(hidden, head, targets, bias=bias, **kwargs)
    _, dhidden = oracle.gradients(grad, hidden, head, targets, bias=bias, **kwargs)
    for logp, got in both(hidden, head, targets, grad, bias=bias, backend=backend, **kwargs):
        assert (logp - want.logp).abs().max() <= 2 * (plain.logp - want.logp).abs().max() + EPS
        assert (got - dhidden).abs().max() <= 2 * (leaf.grad - dhidden).abs().max() + EPS


def test_reference_formula_is_autograds() -> None:
    hidden, head, targets, grad = (x.double() if x.is_floating_point() else x for x in problem(9, 5, 37))
    targets[3] = -100
    for kwargs in ({}, {"temperature": 0.5, "softcap": 2.0}):
        leaf = hidden.clone().requires_grad_()
        oracle.linear_logprob(leaf, head, targets, **kwargs).logp.backward(grad)
        torch.testing.assert_close(leaf.grad, oracle.gradients(grad, hidden, head, targets, **kwargs)[1])
        z = F.linear(hidden, head)
        z = (2.0 * torch.tanh(z / 2.0) / 0.5) if kwargs else z
        plain = -F.cross_entropy(z, targets, reduction="none", ignore_index=-100)
        torch.testing.assert_close(oracle.linear_logprob(hidden, head, targets, **kwargs).logp, plain)


def test_float64_passes_gradcheck() -> None:
    hidden, head, targets, _ = (x.double() if x.is_floating_point() else x for x in problem(5, 3, 11))
    bias, targets[2] = torch.randn(11).double(), -100
    leaf = hidden.requires_grad_()
    assert linear_logprob(leaf, head, targets).dtype == torch.float64
    for softcap in (None, 1.5):
        numbers = {"bias": bias, "softcap": softcap, "temperature": 0.8, "chunk_size": 2}
        assert torch.autograd.gradcheck(lambda h, kw=numbers: linear_logprob(h, head, targets, **kw), (leaf,))


@pytest.mark.parametrize("missing", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_target(missing: float, backend: str) -> None:
    """p of the target up to 1 - 1e-6: log-prob and gradient to 40 ulp of themselves, not of 1."""
    z = torch.zeros(4, 1003)
    targets = torch.tensor([0, 512, 1002, 77])
    z.scatter_(1, targets[:, None], -float(torch.tensor(missing / 1002).log()))
    hidden, head = exact_logits(z)
    grad = torch.tensor([1.0, -3.0, 0.5, 2.0])
    want = oracle.linear_logprob(hidden, head, targets)
    dlogits, _ = oracle.gradients(grad, hidden, head, targets)
    seen = torch.zeros(4, 1003)

    def keep(start: int, stop: int, dz: torch.Tensor) -> None:
        seen[start:stop] = dz

    logp, _, _ = logprob_and_grad(hidden, head, targets, weights_of(grad), on_dlogits=keep, backend=backend)
    assert ((logp / want.logp - 1).abs() <= 40 * EPS).all()
    assert ((seen / dlogits - 1).abs() <= 60 * EPS).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset(offset: float, backend: str) -> None:
    z = torch.randint(-640, 640, (6, 1003)).float() / 64  # exact in float32 with and without the offset
    hidden, head = exact_logits(z)
    targets, bias = torch.randint(0, 1003, (6,)), torch.full((1003,), offset)
    grad = torch.randn(6)
    (plain, dplain), _ = both(hidden, head, targets, grad, backend=backend)
    (moved, dmoved), _ = both(hidden, head, targets, grad, backend=backend, bias=bias)
    assert torch.equal(plain, moved) and torch.equal(dplain, dmoved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_belongs_to_its_token(backend: str) -> None:
    """Random signs, one-hot and zero upstream gradients: applied per token, before any sum."""
    hidden, head, targets, _ = problem(65, 32, 1003)
    signs = torch.where(torch.rand(65) < 0.5, -1.0, 1.0)
    one_hot = torch.zeros(65)
    one_hot[40] = 3.0
    whole = both(hidden, head, targets, torch.ones(65), backend=backend, chunk_size=16)[0][1]
    for got in (d for _, d in both(hidden, head, targets, signs, backend=backend, chunk_size=16)):
        assert torch.equal(got, whole * signs[:, None])
    for got in (d for _, d in both(hidden, head, targets, one_hot, backend=backend, chunk_size=16)):
        assert (got[one_hot == 0] == 0).all()
        # alone in its chunk, the token meets another kernel of the GEMM: other roundings, the same sums
        dlogits, _ = oracle.gradients(one_hot[40:41], hidden[40:41], head, targets[40:41])
        assert ((got[40] - 3 * whole[40]).abs() <= 100 * EPS * (dlogits.abs() @ head.double().abs())[0]).all()


def test_tokens_without_gradient_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    logits = chunks.Logits.of

    def counting(self: chunks.Logits, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(chunks.Logits, "of", counting)
    hidden, head, targets, _ = problem(40, 16, 129)
    targets[10:] = -100
    grad = torch.zeros(40)
    grad[3:8] = 1.0
    leaf = hidden.requires_grad_()
    logp = linear_logprob(leaf, head, targets)
    assert sum(rows) == 10
    logp.backward(grad)
    assert sum(rows) == 15
    rows.clear()
    assert (linear_logprob(leaf, head, torch.full((40,), -100)) == 0).all() and not rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_chunks_or_company(dtype: torch.dtype) -> None:
    """C++: a token's numbers are its own, whatever shares its chunk; and both functions give the same."""
    hidden, head, targets, grad = problem(64, 200, 4099)
    hidden, head = hidden.to(dtype), head.to(dtype)
    logp, got = both(hidden, head, targets, grad, chunk_size=64, backend="cpu")[0]
    for chunk in (1, 2, 4, 8, 13, 32, 64):
        for again in both(hidden, head, targets, grad, chunk_size=chunk, backend="cpu"):
            assert torch.equal(again[0], logp) and torch.equal(again[1], got)
    some = torch.tensor([40, 3, 17, 17, 60])
    for again in both(hidden[some], head, targets[some], grad[some], backend="cpu"):
        assert torch.equal(again[0], logp[some]) and torch.equal(again[1], got[some])


@pytest.mark.long
def test_error_does_not_grow_with_chunks_or_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch: sums over panels of the head are carried in float32."""
    hidden, head, targets, grad = problem(64, 64, 4099)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    want = oracle.linear_logprob(hidden, head, targets).logp
    _, dwant = oracle.gradients(grad, hidden, head, targets)
    errors = {}
    for panel in (16, 256, 8192):
        monkeypatch.setattr(reference, "PANEL", panel)
        for chunk in (1, 4, 16, 64):
            logp, got = both(hidden, head, targets, grad, chunk_size=chunk, backend="reference")[0]
            errors[panel, chunk] = ((logp - want).abs().max(), (got - dwant).abs().max())
    for logp_error, d_error in errors.values():
        assert logp_error <= 2 * errors[8192, 64][0] and d_error <= 2 * errors[8192, 64][1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_against_plain_torch(dtype: torch.dtype, backend: str) -> None:
    """Same 16-bit numbers in, float32 log-probs out; at most twice plain torch's error (in fact far below)."""
    hidden, head, targets, grad = problem(33, 64, 1003)
    hidden, head = hidden.to(dtype), head.to(dtype)
    leaf = hidden.clone().requires_grad_()
    plain = torch.log_softmax(F.linear(leaf, head).float(), -1).gather(1, targets[:, None])[:, 0]
    plain.backward(grad)
    want = oracle.linear_logprob(hidden, head, targets).logp
    _, dwant = oracle.gradients(grad, hidden, head, targets)
    for logp, got in both(hidden, head, targets, grad, backend=backend):
        assert logp.dtype == torch.float32 and got.dtype == dtype
        assert (logp - want).abs().max() <= 2 * logit_bound(hidden, head).max() + 300 * EPS  # float32 sums
        assert (logp - want).abs().max() <= 2 * (plain - want).abs().max()
        assert (got - dwant).abs().max() <= 2 * (leaf.grad - dwant).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    hidden, head, targets, grad = problem(17, 40, 1003)
    hidden, head = hidden.to(dtype), head.to(dtype)
    want = both(hidden, head, targets, grad)
    wide = torch.cat([hidden, hidden], dim=1)[:, :40]
    spread = torch.stack([targets, targets], dim=1)[:, 0]
    for got in (
        both(hidden.t().contiguous().t(), head, targets, grad),
        both(wide, head.t().contiguous().t(), spread, grad),
        both(hidden, torch.cat([head, head], dim=1)[:, :40], targets, torch.stack([grad, grad], dim=1)[:, 0]),
    ):
        for a, b in zip(got, want):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_leaves_other_tokens_right(backend: str) -> None:
    hidden, head, targets, grad = problem(20, 24, 1003)
    clean = both(hidden, head, targets, grad, backend=backend)
    hidden[5, 3] = float("nan")
    hidden[6, 0] = float("inf")
    hidden[7, 1], grad[7] = float("nan"), 0.0
    bad = torch.tensor([5, 6, 7])
    others = torch.tensor([i for i in range(20) if i not in (5, 6, 7)])
    for (logp, got), (logp_clean, got_clean) in zip(
        both(hidden, head, targets, grad, backend=backend), clean
    ):
        assert logp[bad].isnan().all() and got[5:7].isnan().all() and (got[7] == 0).all()
        assert torch.equal(logp[others], logp_clean[others])
        torch.testing.assert_close(got[others], got_clean[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "d", "vocab"),
    [(1, 33, 1), (7, 33, 98), (7, 8, 1003), (13, 24, 5003), (65, 64, 50257), (130, 104, 129)],
)
def test_same_bits_for_any_thread_count(n: int, d: int, vocab: int) -> None:
    hidden, head, targets, grad = problem(n, d, vocab)
    seen = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        seen.append(both(hidden, head, targets, grad))
    for again in seen[1:]:
        for a, b in zip(again, seen[0]):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_two_backwards() -> None:
    hidden, head, targets, grad = problem(20, 24, 129)
    leaf = hidden.requires_grad_()
    logp = linear_logprob(leaf, head, targets)
    (first,) = torch.autograd.grad(logp, leaf, grad, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(logp, leaf, 2 * grad, retain_graph=True)
    (third,) = torch.autograd.grad(logp, leaf, grad)
    assert torch.equal(second, 2 * first) and torch.equal(third, first) and torch.equal(first, kept)


def test_a_second_derivative_is_refused() -> None:
    hidden, head, targets, grad = problem(5, 24, 129)
    leaf = hidden.requires_grad_()
    (first,) = torch.autograd.grad(linear_logprob(leaf, head, targets), leaf, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        first.square().sum().backward()


def test_one_pass_sees_each_chunk_once() -> None:
    hidden, head, targets, grad = problem(50, 16, 129)
    calls, chunks_seen, dz_all = [], [], torch.zeros(50, 129)

    def weigh(logp: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        assert logp.shape == (stop - start,) and not logp.requires_grad
        calls.append((start, stop))
        return torch.exp(logp) * grad[start:stop]  # weights that depend on the log-probs

    def on_dlogits(start: int, stop: int, dz: torch.Tensor) -> None:
        assert dz.dtype == torch.float32 and dz.shape == (stop - start, 129) and dz.stride(1) == 1
        chunks_seen.append((start, stop))
        dz_all[start:stop] = dz

    logp, dhidden, weights = logprob_and_grad(
        hidden.requires_grad_(), head, targets, weigh, chunk_size=16, on_dlogits=on_dlogits, softcap=4.0
    )
    assert calls == chunks_seen == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert torch.equal(weights, logp.exp() * grad)
    dlogits, want = oracle.gradients(weights, hidden.detach(), head, targets, softcap=4.0)
    torch.testing.assert_close(dz_all.double(), dlogits, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(dhidden.double(), want, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_exist_for_one_chunk_only(backend: str, dtype: torch.dtype) -> None:
    n, vocab, chunk = 640, 4096, 64
    hidden, head, targets, grad = problem(n, 16, vocab)
    hidden, head = hidden.to(dtype), head.to(dtype)
    args = (hidden, head, targets, None, 1.0, 0.0, -100)
    with Largest() as largest:
        logp, top, log_sum, _ = ops._forward(*args, True, chunk, backend)
        ops._backward(grad, *args[:4], logp, top, log_sum, *args[4:], chunk, backend)
        logprob_and_grad(hidden, head, targets, weights_of(grad), chunk_size=chunk, backend=backend)
    assert chunk * vocab <= largest.elements <= (chunk + 8) * (vocab + 32)
    assert chunks.default_chunk(n * 100, vocab) * vocab * 4 <= 1.5 * chunks.LOGITS_BYTES


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round(backend: str) -> None:
    hidden, head, targets, grad = problem(20, 24, 129)
    want = both(hidden, head, targets, grad, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(hidden, head, targets, grad, backend=backend)
    for a, b in zip(got, want):
        assert a[0].dtype == torch.float32 and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, head, targets, grad = problem(9, 8, 37)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype)
    targets[2] = -100
    settings = (0.7, 5.0, -100, 4, None)
    op, bias = torch.ops.cropi.linear_logprob.default, torch.randn(37, dtype=dtype)
    library.opcheck(op, (hidden, head, targets, None, True, *settings))
    library.opcheck(op, (hidden, head, targets, bias, False, *settings))
    logp, top, log_sum, _ = op(hidden.detach(), head, targets, bias, False, *settings)
    args = (grad.to(logp.dtype), hidden.detach(), head, targets, bias, logp, top, log_sum, *settings)
    library.opcheck(torch.ops.cropi.linear_logprob_backward.default, args)


@pytest.mark.long
def test_compiles_whole() -> None:
    hidden, head, targets, grad = problem(20, 24, 129)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logp, entropy = linear_logprob(hidden * 2, head, targets, temperature=0.9, return_entropy=True)
        return (logp * grad).sum() + entropy.sum()

    eager, traced = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    assert torch.equal(eager.grad, traced.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([1, 2, 3, 9])}, r"targets\[3\]=9.*ignore_index=-100"),
        ({"targets": torch.tensor([1, -1, 3, 8])}, r"targets\[1\]=-1"),
        ({"targets": torch.tensor([1, 2, 3])}, r"one target per token, \[4\]"),
        ({"targets": torch.zeros(4)}, "int64"),
        ({"hidden": torch.zeros(2, 2, 5)}, r"hidden has shape \(2, 2, 5\)"),
        ({"hidden": torch.zeros(4, 6)}, r"head has shape \(9, 5\)"),
        (
            {"hidden": torch.zeros(4, 5, dtype=torch.bfloat16)},
            "head is torch.float32.*hidden is torch.bfloat16",
        ),
        ({"hidden": torch.zeros(4, 5, dtype=torch.int64)}, "hidden is torch.int64"),
        (
            {x: torch.zeros(n, 5, dtype=torch.float8_e4m3fn) for x, n in (("hidden", 4), ("head", 9))},
            "hidden is torch.float8_e4m3fn: give float32",
        ),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\)"),
        ({"head": torch.zeros(9, 5, requires_grad=True)}, r"head requires a gradient.*head.detach\(\)"),
        ({"bias": torch.zeros(9, requires_grad=True)}, "bias requires a gradient"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        # No normal numbers of float32, where the kernels hold them: 1e-46 is 0 there, and a soft-cap of 0 is none.
        ({"temperature": 1e-39}, "temperature=1e-39"),
        ({"temperature": 1e39}, r"temperature=1e\+39"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"softcap": 1e-46}, "softcap=1e-46"),
        ({"softcap": 1e39}, r"softcap=1e\+39"),
        ({"softcap": 3e38}, r"softcap=3e\+38.* to 1e\+30 \(a larger one caps nothing\), or None"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"backend": "tpu"}, "backend='tpu'"),
        ({"backend": ""}, "backend='': choose one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(4, 5), "head": torch.zeros(9, 5), "targets": torch.tensor([0, 1, 2, 8])}
    call = {**good, **change}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**call)
    if "requires a gradient" not in message:  # one pass forms none
        with pytest.raises(ValueError, match=message):
            logprob_and_grad(**call, weigh=lambda logp, start, stop: logp)


def test_named_backend_raises_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        linear_logprob(
            torch.zeros(1, 2).double(), torch.zeros(3, 2).double(), torch.tensor([0]), backend="cpu"
        )


@pytest.mark.parametrize("wrong", [torch.zeros(3), 1.0, torch.zeros(2, 1)], ids=["length", "number", "shape"])
def test_weigh_must_return_its_weights(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"weigh\(logp, 0, 2\)"):
        logprob_and_grad(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), lambda *_: wrong)


def test_weigh_may_compute_in_place() -> None:
    hidden, head, targets, _ = problem(20, 24, 129)
    want = logprob_and_grad(hidden, head, targets, lambda logp, start, stop: logp.exp())
    got = logprob_and_grad(hidden, head, targets, lambda logp, start, stop: logp.exp_())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_trainable_head_is_fine_without_grad_mode() -> None:
    hidden, head, targets, _ = problem(4, 8, 33)
    with torch.no_grad():
        assert not linear_logprob(hidden, head.requires_grad_(), targets).requires_grad
    with pytest.raises(RuntimeError, match="no gradient for head"):
        leaf = hidden.requires_grad_()
        out = torch.ops.cropi.linear_logprob(leaf, head, targets, None, False, 1.0, 0.0, -100, 0, None)
        out[0].sum().backward()
