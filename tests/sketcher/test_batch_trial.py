"""What `GradientSketcher.batch` finds before its first block: mended, or listed in one error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import architectures, zoo
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.attach.coverage import UncoveredParameterError
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(1024, width=16, vocab_width=64)
SEGMENTS = torch.tensor([0, 0, 1])
IDS = (torch.arange(15).view(3, 5) * 7 + 3) % 30


class Part(nn.Module):
    """Multiplies by the weight of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, self.called = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(torch.tanh(x) @ self.beside.weight.T) + x  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """Returns tokens, and beside them a mean over each row that passes a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.of_mean = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), self.of_mean(x.mean(1, keepdim=True))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Small(nn.Module):
    def __init__(self, pooled: bool, own: bool = False) -> None:
        super().__init__()
        self.emb, self.part, self.head = nn.Embedding(30, 8), Part(), nn.Linear(8, 30)
        self.pooled = Pooled() if pooled else None
        self.steering = nn.Parameter(torch.randn(8)) if own else None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.emb

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.part(self.emb(input_ids))
        if self.pooled is not None:
            tokens, mean = self.pooled(x)
            x = tokens + mean
        if self.steering is not None:
            return Output(self.head(x * self.steering))
        return self.head(x)


def exact(model: nn.Module, exclude: tuple[str, ...]) -> torch.Tensor:
    wide, total = model.double(), torch.zeros(2, SPEC.dim, dtype=torch.float64)
    for row, segment in enumerate(SEGMENTS.tolist()):
        wide.zero_grad()
        loss(wide, slice(row, row + 1)).backward()
        total[segment] += sketch_gradients(
            wide, {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}, SPEC, exclude
        )
    model.float()
    return total


def loss(model: nn.Module, rows: slice = slice(0, 3)) -> torch.Tensor:
    y = model(IDS[rows])
    return torch.tanh(getattr(y, "logits", y)).pow(2).sum()


def in_batch(model: nn.Module, exclude: Any = ()) -> tuple[torch.Tensor, GradientSketcher]:
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        with sketcher.batch(SEGMENTS, shape=(3, 5)) as out:
            loss(model).backward()
    return out.sketches, sketcher


def assert_right(got: torch.Tensor, want: torch.Tensor) -> None:
    # Five layers of at most 30 products each way, by the random walk of their roundings.
    assert bool(((got - want).norm(dim=1) <= 40 * 2.0**-24 * 5 * want.norm(dim=1)).all())


def test_a_weight_that_is_used_beside_its_module_is_formed() -> None:
    torch.manual_seed(0)
    model = Small(pooled=False)
    got, sketcher = in_batch(model)
    assert sketcher.coverage.by_kind["exact"] == 64
    assert_right(got, exact(model, ()))


def test_all_that_batch_cannot_sketch_is_one_error_and_can_be_left_out() -> None:
    torch.manual_seed(0)
    model = Small(pooled=True)
    model.second = Pooled()  # type: ignore[assignment]
    model.pooled, first = nn.Sequential(), model.pooled
    model.pooled.append(Both(first, model.second))
    with pytest.raises(UncoveredParameterError) as error:
        in_batch(model)
    words = str(error.value)
    assert "pooled.0.first.of_mean (Linear)" in words and "second.of_mean (Linear)" in words, words
    assert "exclude=['" in words and "_mean.weight', ...]" in words
    share = 2 * 72 / sum(p.numel() for p in model.parameters())
    assert f"({share:.2%} of all parameters)" in words
    got, sketcher = in_batch(model, "uncovered")
    assert sum(sketcher.coverage.uncovered.values()) == 2 * 72
    assert sketcher.coverage.by_kind["exact"] == 64  # what was mended before stays so
    assert_right(got, exact(model, tuple(sketcher.coverage.uncovered)))


class Both(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mean = self.first(x)
        again, other = self.second(tokens)
        return again, mean + other


def test_a_parameter_of_the_root_module_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        UncoveredParameterError, match=r"the model itself \(Small\): no output of it"
    ) as error:
        in_batch(Small(pooled=False, own=True))
    assert "exclude=['steering', ...]" in str(error.value)
    model = Small(pooled=False, own=True)
    got, sketcher = in_batch(model, "uncovered")
    assert sketcher.coverage.uncovered == {"steering": 8}
    assert_right(got, exact(model, ("steering",)))


class InPlace(Small):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(input_ids)
        x *= 2
        return self.head(self.part(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_may_change_what_it_looked_up_in_place(trained: bool) -> None:
    """Also where the embedding is frozen, as in a model with adapters."""
    torch.manual_seed(0)
    model = InPlace(pooled=False)
    model.emb.weight.requires_grad_(trained)
    got, _ = in_batch(model)
    assert_right(got, exact(model, ()))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["policy_gradient", "batch"])
def test_blt_without_what_its_encoder_hands_on(way: str) -> None:
    """Byte-latent transformers: patches go from part to part beside the tokens."""
    model = architectures.small("blt")
    with GradientSketcher(model, architectures.SPEC, "uncovered") as sketcher:
        if way == "batch":
            got = architectures.by_batch(sketcher, model)
        else:
            got = architectures.by_policy_gradient(sketcher)
    left_out = sketcher.coverage.uncovered
    assert left_out and all(name.startswith("model.local_encoder.") for name in left_out)
    want = architectures.exact("blt", tuple(left_out))
    assert bool(((got - want).norm(dim=1) <= 1e-5 * want.norm(dim=1)).all())


@pytest.mark.parametrize("segments", ["rows", "within a row"])
def test_a_weight_that_a_hook_makes_before_the_call_is_formed(segments: str) -> None:
    """torch.nn.utils.weight_norm: a hook before the call computes the weight from two parameters."""
    torch.manual_seed(0)
    model: Any = zoo.make("llama")
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)
    batch = zoo.padded()
    # A caller's no_grad does not apply.
    with torch.no_grad(), GradientSketcher(model, architectures.SPEC) as sketcher:
        if segments == "rows":
            got = batch.sketch(sketcher).sketches
        else:
            got = batch.sketch(
                sketcher, segments=batch.segments[:, None].expand_as(batch.input_ids).contiguous()
            ).sketches
    want = zoo.sketches(model, zoo.gradients(model), architectures.SPEC)
    assert bool(((got - want).norm(dim=1) <= 1e-5 * want.norm(dim=1)).all())
