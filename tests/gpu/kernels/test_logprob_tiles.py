"""Log-probs whose logits leave the tensor cores as statistics, against float64 and the path by whole logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from cropi_kernels import GradientSketcher, SketchSpec, dispatch, linear_logprob, logprob_and_grad
from cropi_kernels.ops.linear_logprob import chunks, oracle, triton_tile_kernels, triton_tiles
from cropi_kernels.ops.linear_logprob.api import logprob_and_grad_of
from cropi_kernels.ops.linear_logprob.contract import RowMath, Settings
from cropi_kernels.ops.linear_logprob.ops import prepare

HALF = torch.float16  # what the interpreter computes


def made(
    n: int, vocab: int, features: int, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, features, generator=g).to(HALF)
    head = (torch.randn(vocab, features, generator=g) * 3 / features**0.5).to(HALF)
    return hidden, head, torch.randint(0, vocab, (n,), generator=g), torch.randn(n, generator=g)


@pytest.fixture(autouse=True)
def products_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's bits do not depend on its place in a tile, as on tensor cores. The interpreter calls numpy's product,
    whose bits do on some CPUs (OpenBLAS 0.3.31, AMD EPYC with AVX2: 3420 of 32768 sums of 64 products)."""

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        sums = np.einsum("ik,kj->ij", a.data.astype(d.data.dtype), b.data.astype(d.data.dtype))
        return TensorHandle(sums + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=["anchors of tiles", "anchors of rows", "logits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # A row of a real vocabulary has hundreds of tiles, which are summed in several steps: so are the few of these.
    monkeypatch.setattr(triton_tiles, "COMBINED_TILES", 2)
    monkeypatch.setattr(triton_tiles, "RESCALED_TILES", 2)
    if request.param == "logits":
        monkeypatch.setattr(triton_tiles, "serves", lambda *args: False)
    if request.param == "anchors of rows":
        anchored_by_row(monkeypatch)
    return str(request.param)


def anchored_by_row(monkeypatch: pytest.MonkeyPatch, far: float = 2.0**12) -> None:
    """As bfloat16 is, which the interpreter cannot compute; ``far`` for float16, whose largest number is 2^16."""
    monkeypatch.setattr(triton_tiles, "by_row", lambda dtype: True)
    monkeypatch.setattr(triton_tile_kernels, "FAR", tl.constexpr(far))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "soft-cap": {"softcap": 2.0, "temperature": 1.3},
    "bias": {"bias": True},
}


SIZES = [(1, 1, 8), (3, 255, 64), (130, 257, 72), (5, 700, 136)]


# Sizes decide which tiles a program has, settings what is done to a number: every size once, every setting once.
@pytest.mark.parametrize(
    "settings, n, vocab, features",
    [*(("plain", *size) for size in SIZES), *((name, *SIZES[-1]) for name in SETTINGS if name != "plain")],
)
def test_against_the_formula(way: str, n: int, vocab: int, features: int, settings: str) -> None:
    hidden, head, targets, grad = made(n, vocab, features)
    given = dict(SETTINGS[settings])
    cap = given.get("softcap", 0.0)
    by_tiles = way != "logits"
    if by_tiles and cap:  # as with "logits"
        assert not triton_tiles.serves(hidden, head, RowMath(1.0, cap))
        return
    assert triton_tiles.serves(hidden, head, RowMath(1.0, cap)) == by_tiles
    if given.get("bias"):
        given["bias"] = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    if n > 1:
        targets[1] = -100
    logp, entropy = linear_logprob(hidden, head, targets, return_entropy=True, backend="triton", **given)
    wide = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    right = oracle.linear_logprob(hidden.double(), head.double(), targets, **wide)
    # A float32 sum of as many products as there are features, of logits up to some 10.
    slack = 1e-5 * (1 + right.logp.abs())
    assert ((logp.double() - right.logp).abs() <= slack).all()
    assert ((entropy.double() - right.entropy).abs() <= 10 * slack)[targets >= 0].all()
    dzs: list[torch.Tensor] = []
    keep = lambda start, stop, dz: dzs.append(dz.double())  # noqa: E731
    weigh = lambda logp, start, stop: grad[start:stop]  # noqa: E731
    again, got, _ = logprob_and_grad(
        hidden, head, targets, weigh, on_dlogits=keep, chunk_size=96, backend="triton", **given
    )
    assert torch.equal(again, logp) or not by_tiles, "a token's bits do not depend on the chunk"
    exact, dhidden = oracle.gradients(grad.double(), hidden.double(), head.double(), targets, **wide)
    dz = torch.cat(dzs)
    # Rounded once where logits are kept in float32, twice where a tile's numbers are.
    unit = torch.finfo(HALF).eps / 2 * (2 if by_tiles else 1)
    least = torch.full((n, 1), 2.0**-24, dtype=torch.float64)
    # What is kept is lifted to no other exponents, and is scaled by the row's weight.
    if way == "anchors of rows":
        least += 2.0**-24 * grad.double().abs()[:, None] / given.get("temperature", 1.0)
    assert ((dz - exact).abs() <= (unit + 4e-5) * exact.abs() + least).all()
    assert (dz[targets < 0] == 0).all()
    size = exact.abs() @ head.double().abs()
    assert ((got.double() - dhidden).abs() <= 3 * torch.finfo(HALF).eps * size + 1e-6).all()


def test_words_that_are_barred(way: str) -> None:
    """Their logits are -infinity: a tile without a finite number, one with both kinds, and a target among them."""
    hidden, head, _, grad = made(5, 700, 136)
    targets, bias = torch.tensor([5, 300, 699, -100, 450]), torch.zeros(700)
    bias[:300] = -math.inf
    given = {"bias": bias, "temperature": 0.7}
    logp, entropy = linear_logprob(hidden, head, targets, return_entropy=True, backend="triton", **given)
    wide = hidden.double(), head.double(), targets
    right = oracle.linear_logprob(*wide, bias=bias.double(), temperature=0.7)
    assert logp[0] == right.logp[0] == -math.inf
    assert ((logp.double() - right.logp)[1:].abs() <= 1e-5 * (1 + right.logp[1:].abs())).all()
    assert ((entropy.double() - right.entropy).abs() <= 1e-4 * (1 + right.entropy)).all()
    _, got, _ = logprob_and_grad(hidden, head, targets, lambda p, a, b: grad[a:b], backend="triton", **given)
    exact, dhidden = oracle.gradients(grad.double(), *wide, bias=bias.double(), temperature=0.7)
    size = exact.abs() @ head.double().abs()
    assert ((got.double() - dhidden).abs() <= 3 * torch.finfo(HALF).eps * size + 1e-6).all()


@pytest.mark.parametrize("far", [1.0, 2.0**8, 2.0**14])
def test_rows_with_a_factor(monkeypatch: pytest.MonkeyPatch, far: float) -> None:
    """Times its factor, a row is the gradient: where its tiles share the target's logit as their anchor, where some are
    far above it and are computed again, and where it does not count."""
    hidden, head, targets, grad = made(130, 700, 72)
    targets[4], grad[5], hidden[6] = -100, 0.0, float("nan")
    grad[6] = 0.0
    hidden[7] *= 8  # beyond what float16 could hold with the target's logit as its anchor
    anchored_by_row(monkeypatch, far)
    anchored = {0: 0, 1: 0}
    backward = triton_tiles.Tiles.backward

    def counted(self: triton_tiles.Tiles, target: torch.Tensor, *args: Any) -> Any:
        moved = args[1].top[target >= 0] != self.own[: len(target)][target >= 0]
        for value in (0, 1):
            anchored[value] += int((moved == bool(value)).sum())
        return backward(self, target, *args)

    monkeypatch.setattr(triton_tiles.Tiles, "backward", counted)
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "triton")
    rows: list[torch.Tensor] = []
    given: dict[str, Any] = {"temperature": 0.8, "bias": torch.randn(700)}
    weigh = lambda p, a, b: grad[a:b]  # noqa: E731
    logp, got, _ = logprob_and_grad_of(
        hidden, head, targets, weigh, **given,
        on_gradient=lambda a, b, g: rows.append(g.dz.double() * g.factor.double()[:, None]),
    )  # fmt: skip
    assert anchored[1] > 100 if far == 1.0 else min(anchored.values()) > 5, anchored
    sound = torch.arange(130) != 6
    hidden[6] = 0.0  # it has no gradient, whatever it is
    wide = {"temperature": 0.8, "bias": given["bias"].double()}
    right = oracle.linear_logprob(hidden.double(), head.double(), targets, **wide)
    assert ((logp.double() - right.logp).abs() <= 1e-5 * (1 + right.logp.abs()))[sound].all() and logp[
        6
    ].isnan()
    exact, dhidden = oracle.gradients(grad.double(), hidden.double(), head.double(), targets, **wide)
    dz = torch.cat(rows)
    unit = torch.finfo(HALF).eps  # two roundings
    # The smallest number of float16 times a row's factor, which is below its weight over the temperature.
    least = 2.0**-24 * grad.double().abs()[:, None] / 0.8
    assert ((dz - exact).abs() <= (unit + 4e-5) * exact.abs() + least).all()
    assert (dz[[4, 5, 6]] == 0).all() and (got[[4, 5, 6]] == 0).all()
    size = exact.abs() @ head.double().abs()
    assert ((got.double() - dhidden).abs() <= 3 * unit * size + 1e-6).all()
    asked: list[torch.Tensor] = []  # a caller of the public function gets the gradient itself
    logprob_and_grad(
        hidden, head, targets, weigh, **given, on_dlogits=lambda a, b, dz: asked.append(dz.double())
    )
    assert ((torch.cat(asked) - exact).abs() <= (unit + 4e-5) * exact.abs() + least + 2.0**-24).all()


def test_a_tile_that_is_far_is_found_by_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, grad = made(130, 700, 72)
    hidden[:129] = 0.0  # no tile of the first program is far
    hidden[129] *= 4
    targets[129] = int((hidden[129] @ head.T).argmin())
    anchored_by_row(monkeypatch, 2.0**14)
    monkeypatch.setattr(triton_tiles, "FLAGS", 1)  # tiles of tokens that a program looks at
    _, got, _ = logprob_and_grad(hidden, head, targets, lambda p, a, b: grad[a:b], backend="triton")
    exact, dhidden = oracle.gradients(grad.double(), hidden.double(), head.double(), targets)
    size = exact.abs() @ head.double().abs()
    assert ((got.double() - dhidden).abs() <= 3 * torch.finfo(HALF).eps * size + 1e-6).all()


def test_as_near_as_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a gradient, by autograd too; the tables of tiles are poisoned before."""
    hidden, head, targets, grad = made(40, 600, 64)
    exact, dhidden = oracle.gradients(grad.double(), hidden.double(), head.double(), targets)
    empty = torch.empty
    poisoned = lambda x: x.fill_(float("nan") if x.is_floating_point() else 1)  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    leaf = hidden.clone().requires_grad_(True)
    logp = linear_logprob(leaf, head, targets, chunk_size=32, backend="triton")
    assert isinstance(logp, torch.Tensor)
    (logp * grad).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    error = (leaf.grad.double() - dhidden).norm()
    monkeypatch.setattr(triton_tiles, "serves", lambda *args: False)
    _, by_logits, _ = logprob_and_grad(hidden, head, targets, lambda p, a, b: grad[a:b], backend="triton")
    assert error <= 2 * (by_logits.double() - dhidden).norm() <= 2e-3 * dhidden.norm()


def test_a_confident_target_keeps_its_digits() -> None:
    """1 - p is a sum of the others: right to relative precision however near p is to 1, and so is the gradient."""
    hidden, head, targets, _ = made(4, 600, 64)
    for i, word in enumerate(targets.tolist()):
        head[word] = hidden[i] * (26.0 / float(hidden[i].float().square().sum()))
    seen: list[torch.Tensor] = []
    logp, _, _ = logprob_and_grad(
        hidden, head, targets, lambda p, a, b: torch.full_like(p, 1e4), backend="triton",
        on_dlogits=lambda a, b, dz: seen.append(dz.double()),
    )  # fmt: skip
    right = oracle.linear_logprob(hidden.double(), head.double(), targets)
    p = torch.expm1(right.logp)
    assert (p.abs() < 1e-5).all() and ((torch.expm1(logp.double()) / p - 1).abs() < 1e-4).all()
    exact, _ = oracle.gradients(
        torch.full((4,), 1e4, dtype=torch.float64), hidden.double(), head.double(), targets
    )
    # float16 holds numbers of 2^-24 and multiples of them.
    assert ((seen[0] - exact).abs() <= 1.1e-3 * exact.abs() + 2.0**-24).all()


def test_rows_that_are_broken_leave_the_others() -> None:
    hidden, head, targets, _ = made(6, 300, 32)
    hidden[1, 3], targets[2], targets[4] = float("nan"), -100, 299
    whole = linear_logprob(hidden, head, targets, backend="triton")
    assert isinstance(whole, torch.Tensor)
    assert whole[1].isnan() and whole[2] == 0 and whole[[0, 3, 4, 5]].isfinite().all()
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    seen: list[torch.Tensor] = []
    logprob_and_grad(
        hidden, head, targets, lambda p, a, b: weights, backend="triton",
        on_dlogits=lambda a, b, dz: seen.append(dz.clone()),
    )  # fmt: skip
    assert seen[0].isfinite().all() and (seen[0][1:4] == 0).all() and (seen[0][[0, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("change", ["dtype", "odd features", "odd rows", "one row for all", "empty"])
def test_operands_of_another_kind_go_by_whole_logits(change: str) -> None:
    hidden, head, targets, _ = made(3, 40, 16)
    if change == "dtype":
        hidden, head = hidden.float(), head.float()
    elif change == "odd features":
        hidden, head = hidden[:, :15].contiguous(), head[:, :15].contiguous()
    elif change == "odd rows":
        hidden = torch.randn(3, 17).to(HALF)[:, :16]
    elif change == "one row for all":
        hidden = hidden[:1].expand(3, -1)
    else:
        hidden, targets = hidden[:0], targets[:0]
    assert not triton_tiles.serves(hidden, head, RowMath(1.0, 0.0))
    logp = linear_logprob(hidden, head, targets, backend="triton")
    assert isinstance(logp, torch.Tensor)
    right = oracle.linear_logprob(hidden.double(), head.double(), targets).logp
    torch.testing.assert_close(logp.double(), right, rtol=1e-4, atol=1e-4)


def test_whole_logits_are_cut_by_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with adapters, or of which a rank has a part, keep float32 logits: twice the bytes a token."""
    hidden, head, targets, _ = made(600, 64, 16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(chunks, "DEVICE_LOGITS_BYTES", 64 * 2 * 256)
    settings = Settings(1.0, 0.0, -100, 0, "triton")
    call = prepare(hidden, head, targets, None, settings)
    whole = prepare(hidden, head, targets, None, settings, whole=True)
    assert (call.chunk, whole.chunk) == (256, 128) and whole.tiles is None is not call.tiles


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_a_pass_by_rows_with_factors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The head's own sketch and all behind it; phi's head has a bias, whose gradient is a sum over whole rows."""
    zoo = pytest.importorskip("support.zoo")
    spec = SketchSpec(width=16, vocab_width=64)
    model = zoo.make(name, HALF, num_hidden_layers=1)
    own = zoo.sketches(model, zoo.gradients(model), spec, (), torch.float32)
    served, compute = [], triton_tiles.Tiles.backward

    def backward(self: triton_tiles.Tiles, *args: Any, **kwargs: Any) -> Any:
        gradient = compute(self, *args, **kwargs)
        served.append(gradient.factor is not None)
        return gradient

    anchored_by_row(monkeypatch)
    monkeypatch.setattr(triton_tiles.Tiles, "backward", backward)
    # The interpreter's own kernels take minutes for what is tested elsewhere.
    choose = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose",
        lambda op, *args, **rest: "triton" if op == "linear_logprob" else choose(op, *args, **rest),
    )  # fmt: skip
    with GradientSketcher(model, spec, verify=False) as sketcher:
        got = zoo.LAYOUTS["padded"]().sketch(sketcher).sketches
    assert set(served) == {name == "qwen2"}
    exact = zoo.sketches(model, zoo.gradients(model.double()), spec)
    error, allowed = (got - exact).norm(dim=1), (own - exact).norm(dim=1)
    assert (error <= 2 * allowed).all(), (error, allowed)
    assert (allowed <= 0.1 * exact.norm(dim=1)).all(), "a yardstick this long measures nothing"
