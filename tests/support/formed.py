"""What tests of formed gradients share: the yardstick, and a module that looks like a norm and is none."""

from __future__ import annotations

import torch
from torch import nn

Gradients = list[dict[str, torch.Tensor]]


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
