"""Modules of their own kind, one at a time: what is formed of their parameters is the gradient of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import odd_models, zoo
from support.formed import Affine, by_autograd
from support.zoo import SPEC, assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from cropi_kernels import GradientSketcher
from cropi_kernels.sketcher.taps import exact


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits.softmax(-1), logits  # type: ignore[return-value]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Router(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, logits = self.gate(x)
        return x * weights + logits  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def norm(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.norm(x, x.flip(-1)) / self.temperature}


class NotCalled(nn.Module):
    """The module that owns the parameters is never called, its method is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.norm(x, x + 1)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Flat(nn.Module):
    """Sees the tokens in one axis, as the router of a mixture does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]


class Copies(nn.Module):
    """[copies, batch, length, n], as Gemma-3n has it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.stack([x, x.square()])).sum(0)  # type: ignore[no-any-return]


class TwoUses(nn.Module):
    """One call gives two outputs, both used; the parameter meets tokens and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.rand(4))

    def pair(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        sink = self.sinks.reshape(1, 1, 4).expand(*x.shape[:2], 4)
        return torch.cat([x, sink], -1).softmax(-1)[..., :8], x * self.sinks.sum().exp(), None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return self.pair(x)


class Sum(nn.Module):
    """Adds up whatever the module before returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        parts = y.values() if isinstance(y, dict) else y if isinstance(y, tuple) else (y,)
        return sum(part for part in parts if part is not None)  # type: ignore[return-value]


class Sub(nn.Embedding):
    """Rows are rescaled when they are looked up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def replaced(module: nn.Module) -> nn.Module:
    """A user's forward in place of the class's own."""
    plain = module.forward
    module.forward = lambda x: plain(x) * 1.5 + x  # type: ignore[method-assign]
    return module


def conv1d() -> nn.Module:
    layer = transformers.pytorch_utils.Conv1D(8, 8)
    nn.init.normal_(layer.bias)
    return layer


class Mixing(nn.Linear):
    """Mixes the tokens of a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.cumsum(1) if x.ndim == 3 else x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mixing": lambda: Mixing(8, 8),
    "scaled": lambda: Scaled(8, 8),
    "replaced linear": lambda: replaced(nn.Linear(8, 8)),
    "replaced Conv1D": lambda: replaced(conv1d()),
    "replaced norm": lambda: replaced(nn.RMSNorm(8, 1e-6)),
    "router": Routed,
    "affine": Affine,
    "gated": Gated,
    "not called": NotCalled,
    "convolution": Convolved,
    "flat": Flat,
    "copies": Copies,
    "two outputs": TwoUses,
    "several calls": lambda: nn.Sequential(*[Affine()] * 2),
    "batch norm of running numbers": lambda: nn.Sequential(Affine(), nn.BatchNorm1d(6).eval()),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", MODULES)
def test_modules(case: str, checkpointed: bool) -> None:
    """Two rows of six tokens; segments end at a row, or (where tokens are apart) within one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Sum(MODULES[case]()), nn.Linear(8, 8))
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    ids = [torch.tensor([[0] * 6, [1] * 6])]
    if case not in ("convolution", "mixing"):
        ids.append(torch.tensor([[0] * 4 + [1] * 2, [1] * 3 + [2] * 3]))
    for segments in ids:
        with GradientSketcher(model, SPEC) as sketcher:
            assert {"exact", "router"} & set(sketcher.coverage.by_kind)
            with sketcher.batch(segments) as out:
                inputs = x.clone().requires_grad_(True)
                y = checkpoint(model, inputs, use_reentrant=False) if checkpointed else model(inputs)
                (y * w).sum().backward()
            assert not any(p.requires_grad for p in model.parameters())
        ends = [0, *torch.bincount(segments.flatten()).cumsum(0).tolist()]
        spans = [slice(a, b) for a, b in zip(ends, ends[1:])]
        assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_an_embedding_of_another_kind_has_the_coordinates_of_an_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sub(11, 8, padding_idx=2), nn.Linear(8, 8))
    x, w = torch.randint(11, (2, 6)), torch.randn(2, 6, 8)
    x[0, 0] = 2
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
        (model(x) * w).sum().backward()
    assert sketcher.coverage.by_kind["exact"] == 88
    spans = [slice(0, 6), slice(6, 12)]
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_rows_that_are_looked_up_are_added_without_a_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(exact.Exact, "add", never)
    with GradientSketcher(odd_models.make("opt"), SPEC, verify=False) as sketcher:
        assert zoo.padded().sketch(sketcher).sketches.any()


def test_users_hooks_behind_the_module_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Affine(), nn.RMSNorm(8, 1e-6), nn.Linear(8, 8))
    for module in model:
        module.register_forward_hook(lambda m, args, y: 1.5 * y + y.square())
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
        (model(x) * w).sum().backward()
    spans = [slice(0, 6), slice(6, 12)]
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_a_forward_that_fails_leaves_the_weights_frozen() -> None:
    class Fails(Affine):
        broken = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise KeyError("a mistake in the model")
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Affine(), Fails()), torch.randn(2, 6, 8)
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(KeyError), sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            model(x)
        assert not any(p.requires_grad for p in model.parameters())
        Fails.broken = False
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
            model(x).sum().backward()
    spans, w = [slice(0, 6), slice(6, 12)], torch.ones(2, 6, 8)
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_output_that_holds_no_tokens_is_named() -> None:
    class Pooled(Affine):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.sum((0, 1))

    model = Pooled()
    refused = pytest.raises(
        ValueError, match=r"weight, bias: an output of shape \(8,\) of Pooled has a gradient, and"
    )
    with GradientSketcher(model, SPEC) as sketcher, refused:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            tokens, _ = model(torch.ones(2, 6, 8))
            tokens.sum().backward()  # the other has no gradient
            tokens, pooled = model(torch.ones(2, 6, 8))
            (tokens.sum() + pooled.sum()).backward()
