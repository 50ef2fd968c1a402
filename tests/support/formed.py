"""What tests of formed gradients share: the yardstick, and a module that looks like a norm and is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cropi_kernels import SketchSpec
from support import zoo

SPEC = SketchSpec(width=16, vocab_width=64)
Gradients = list[dict[str, torch.Tensor]]


def assert_close(got: torch.Tensor, model: nn.Module, wide: Gradients, own: Gradients, **given: Any) -> None:
    want = zoo.sketches(model, wide, SPEC, **given)
    near = zoo.sketches(model, own, SPEC, **given, dtype=torch.float32)
    error, allowed, size = (got - want).norm(dim=1), (near - want).norm(dim=1), want.norm(dim=1)
    assert (error <= 2 * allowed).all(), (error / size, allowed / size)
    assert (allowed <= 0.1 * size).all(), "a yardstick this long measures nothing"


def by_autograd(
    model: nn.Module, x: torch.Tensor, w: torch.Tensor, spans: list[slice], wide: bool
) -> Gradients:
    dtype = torch.float64 if wide else torch.float32
    model.to(dtype)
    found = []
    for span in spans:
        model.zero_grad()
        inputs = x.to(dtype) if x.is_floating_point() else x
        (model(inputs) * w.to(dtype)).flatten(0, 1)[span].sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append({n: torch.zeros(()) if g is None else g.clone() for n, g in grads.items()})
    model.zero_grad()
    model.float()
    return found


class Affine(nn.Module):
    """Looks like a norm and is none; its scale has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.rand(1, 1, 8)),
            nn.Parameter(torch.rand(8)),
            1e-6,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias
