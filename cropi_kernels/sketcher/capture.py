"""Hands a module's output gradient to the sketch, from a hook on the output or from an identity in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .graph import packed

Sink = Callable[..., None]


class _Capture(torch.autograd.Function):
    """``y -> y``; in backward ``sink(dy, *saved)``. What is saved goes through autograd: checkpointing works."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
        ctx.sink = sink
        ctx.save_for_backward(*saved)
        # Not a view for autograd, which would refuse what changes it in place (an activation).
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        saved = ctx.saved_tensors  # read once: checkpointing hands its recomputed tensors out a single time
        ctx.sink(dy, *saved)
        return (dy, None) + (None,) * len(saved)


def capture(y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
    """``y`` for the module's users, in a graph whose backward calls ``sink(dy, *saved)``. A no-op without a graph.

    A hook where it can be: the nodes of several hundred functions, cut out of holes where large temporaries would fit,
    raised the resident peak by 8 % (SmolLM2-135M, 1024 tokens, glibc). Where something packs what is saved, a function
    that has it packed: a hook would keep it in memory.
    """
    if not torch.is_grad_enabled():
        return y
    if not y.requires_grad:  # frozen weights on inputs without a graph: it starts here
        y = y.detach().requires_grad_(True)
    # A leaf has no node: `widened_input` could not follow the graph's edges to it. A view (a product with a bias, of
    # three axes) gets another node when it is changed in place, and the hook of the old one is never called.
    if y.is_leaf or packed() or torch.compiler.is_compiling() or y._is_view():
        out: torch.Tensor = _Capture.apply(y, sink, *saved)
        return out
    y.register_hook(lambda dy: sink(dy, *saved))
    return y
