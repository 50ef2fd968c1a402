"""How a tap reaches a backward pass: by a hook on a module's output, or by an identity function in the graph.

Also finds the copy of a module's input that autograd keeps, so that the input is not kept twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

Sink = Callable[..., None]
T = TypeVar("T")
REACH = 16  # nodes looked at: an RMSNorm's scale, cast and product are three, its statistics five more


class _Capture(torch.autograd.Function):
    """``y -> y``; backward calls ``sink(dy, *saved)``. Autograd saves the tensors, so that checkpointing works."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
        ctx.sink = sink
        ctx.save_for_backward(*saved)
        # A view would be refused by autograd where an activation changes it in place.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        saved = ctx.saved_tensors  # read once: checkpointing hands its recomputed tensors out a single time
        ctx.sink(dy, *saved)
        return (dy, None) + (None,) * len(saved)


@contextlib.contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks off at its end, and those that are on already where the next one cannot be registered."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def unless_none(hook: Callable[[torch.Tensor], T]) -> Callable[[torch.Tensor | None], T | None]:
    """``hook``, called for gradients that exist: autograd gives None where a function has no gradient at all."""
    return lambda gradient: None if gradient is None else hook(gradient)


def capture(y: torch.Tensor, sink: Sink, *saved: torch.Tensor) -> torch.Tensor:
    """``y`` for the module's users, in a graph whose backward calls ``sink(dy, *saved)``. A no-op without a graph.

    Where possible this is a hook. Several hundred functions raised the resident peak by 8 % (SmolLM2-135M, 1024 tokens,
    glibc), because their small nodes lie in holes of the heap where large temporaries would fit. Where something packs
    what autograd saves, it is a function, whose saved tensors are packed too: a hook would keep them in memory.
    """
    if not torch.is_grad_enabled():
        return y
    if not y.requires_grad:  # frozen weights on inputs without a graph: the graph starts here
        y = y.detach().requires_grad_(True)
    # A leaf has no node: `widened_input` could not follow the graph's edges to it. A view (a product with a bias, of
    # three axes) gets another node when it is changed in place, and the hook of the old one is never called.
    if y.is_leaf or y._is_view() or packed() or torch.compiler.is_compiling():
        out: torch.Tensor = _Capture.apply(y, sink, *saved)
        return out
    y.register_hook(lambda dy: None if dy is None else sink(dy, *saved))  # as `unless_none`, at one call less
    return y


class _Start(torch.autograd.Function):
    """``y -> y``, where gradients end. A leaf would not do: a model may change what it has looked up in place."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


def checkpointed(model: torch.nn.Module) -> bool:
    """Whether layers may be checkpointed: the older way of that needs an input with a graph."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def start_graph(module: torch.nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that starts a graph at an output of frozen weights, which has none."""
    if isinstance(output, torch.Tensor) and torch.is_grad_enabled() and not output.requires_grad:
        return _Start.apply(output.detach().requires_grad_(True))
    return output


def widened_input(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """The float32 copy of ``x`` that the graph of ``y = f(x)`` keeps for its own backward, or None.

    An RMSNorm of bfloat16 inputs computes in float32 and keeps that copy, but not ``x``: a tap that kept ``x`` would
    add 2 bytes a number, 2.9 GB for the 57 norms of a 1.5B model and 16k tokens. The copy is recognised by the graph's
    edges, as the result of a cast of ``x`` itself, so its values are exactly those of ``x``.

    None where something packs what autograd saves (checkpointing, offloading): nothing of it stays in memory there, and
    reading a saved tensor would unpack it too early.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or x.grad_fn is None or packed():
        return None
    nodes, seen = [y.grad_fn], 0
    while nodes and seen < REACH:
        node = nodes.pop(0)
        seen += 1
        if node is None or node is x.grad_fn:
            continue
        for name in ("_saved_self", "_saved_other"):
            kept = getattr(node, name, None)
            if isinstance(kept, torch.Tensor) and _is_cast_of(kept, x):
                return kept.detach()
        nodes += [following for following, _ in node.next_functions]
    return None


def _is_cast_of(kept: torch.Tensor, x: torch.Tensor) -> bool:
    if kept.dtype != torch.float32 or kept.shape != x.shape or kept.grad_fn is None:
        return False
    behind = ((x.grad_fn, x.output_nr),)
    return kept.grad_fn.name() == "ToCopyBackward0" and kept.grad_fn.next_functions == behind


def packed() -> bool:
    """Whether something packs what autograd saves now: checkpointing, offloading."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    # True where an older torch does not say: the input is kept then.
    return top is None or top(False) is not None
