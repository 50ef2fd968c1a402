"""An identity in the autograd graph that hands a module's output gradient to the sketch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Sink = Callable[..., None]


class _Capture(torch.autograd.Function):
    """``y -> y``; in backward ``sink(dy, *saved)``. What is saved goes through autograd: checkpointing works."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
        ctx.sink = sink
        ctx.save_for_backward(*saved)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        saved = ctx.saved_tensors  # read once: checkpointing hands its recomputed tensors out a single time
        ctx.sink(dy, *saved)
        return (dy, None) + (None,) * len(saved)


def capture(y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
    """``y`` itself, in a graph whose backward calls ``sink(dy, *saved)``. A no-op where no gradient is recorded."""
    if not torch.is_grad_enabled():
        return y
    if not y.requires_grad:  # frozen weights on inputs without a graph: it starts here
        y = y.detach().requires_grad_(True)
    out: torch.Tensor = _Capture.apply(y, sink, *saved)
    return out
