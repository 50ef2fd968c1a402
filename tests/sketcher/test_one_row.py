"""Positions that are looked up for one row of the batch: right where the model adds them to all, an error elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(width=16, vocab_width=64)
Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Positions(nn.Module):
    def __init__(self, add: Add) -> None:
        super().__init__()
        self.words, self.places, self.add = nn.Embedding(11, 8), nn.Embedding(6, 8), add
        self.get_input_embeddings = lambda: self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.add(self.words(ids), self.places(torch.arange(ids.shape[1])[None])).tanh()


def in_place(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    y += p
    return y


ADDED: dict[str, Add] = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "torch.add": lambda x, p: torch.add(x, p, alpha=0.5),
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x * p": lambda x, p: x * p,
    "in place": in_place,
    "to": lambda x, p: x + p.to(x.device).to(torch.float64).to(x.dtype),
    "scaled": lambda x, p: x + 3.0 * p / 2,
    "expand": lambda x, p: x + p.expand(x.shape[0], -1, -1),
    "expand_as": lambda x, p: torch.cat([x, p.expand_as(x)], -1),
    "twice": lambda x, p: (x + p) * (1 - p),
    "shape": lambda x, p: x + p if p.shape[0] == 1 and p.ndim == 3 and p.size(1) == x.size(1) else x,
}


def gradients(
    model: nn.Module, ids: torch.Tensor, weights: torch.Tensor, row: int
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(ids)[row] * weights[row].to(next(model.parameters()).dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ADDED)
def test_right_where_it_is_broadcast(case: str) -> None:
    torch.manual_seed(0)
    model, ids = Positions(ADDED[case]), torch.randint(11, (3, 6))
    weights = torch.randn_like(model(ids))
    with (
        GradientSketcher(model, SPEC) as sketcher,
        sketcher.batch(torch.tensor([0, 1, 2]), shape=(3, 6)) as out,
    ):
        y = model(ids)
        assert type(y) is torch.Tensor
        (y * weights).sum().backward()
    for row in range(3):
        own = sketch_gradients(model, gradients(model.float(), ids, weights, row), SPEC)
        want = sketch_gradients(model, gradients(model.double(), ids, weights, row), SPEC)
        assert (out.sketches[row] - want).norm() <= 2 * (own - want).norm() <= 1e-5 * want.norm()


OTHERWISE: dict[str, Add] = {
    "one row taken out": lambda x, p: x + p[0],
    "squeezed": lambda x, p: x + p.squeeze(0),
    "a table": lambda x, p: x @ p[0].T @ p[0],
    "after a function": lambda x, p: x + p.sin(),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_an_error_where_it_is_used_otherwise(case: str) -> None:
    model, ids = Positions(OTHERWISE[case]), torch.randint(11, (3, 6))
    with (
        GradientSketcher(model, SPEC, verify=False) as sketcher,
        pytest.raises(ValueError, match="places is looked up for one row of 3, and used otherwise than"),
        sketcher.batch(torch.tensor([0, 1, 2]), shape=(3, 6)),
    ):
        plain = model.add(model.words.weight[ids], model.places.weight[None, :6]).tanh()
        y = model(ids)
        assert torch.equal(y, plain), "shapes are those that the model counts on"
        y.sum().backward()


def test_a_batch_of_one_row_may_use_it_anyhow() -> None:
    for add in OTHERWISE.values():
        torch.manual_seed(0)
        model, ids = Positions(add), torch.randint(11, (1, 6))
        weights = torch.randn_like(model(ids))
        with (
            GradientSketcher(model, SPEC) as sketcher,
            sketcher.batch(torch.tensor([0]), shape=(1, 6)) as out,
        ):
            (model(ids) * weights).sum().backward()
        want = sketch_gradients(model, gradients(model.double(), ids, weights, 0), SPEC)
        assert (out.sketches[0] - want).norm() <= 1e-5 * want.norm()
