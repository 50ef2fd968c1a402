"""Whether a trainer's loss is a sum over prompts, read from the autograd graph of its first step.

The parts of a gradient that pass through the tokens of each prompt add up to the gradient, whatever the loss. They are
the gradients of the prompts' own losses only where the loss is a sum of terms of which each depends on one prompt. Two
things are looked for before the first backward pass runs:

- a way from the loss to a weight that does not pass through what the model gave for each token (a term of all tokens
  together, as experts' load balancing; a norm of the weights);
- second derivatives between what the model gave for two prompts: of a sum they are zero exactly. They are zero as well
  where prompts have no gradient (their rewards are equal), so that a batch with fewer than two that have one says
  nothing, and a later one is looked at.

Both hold of the batch that is looked at. A loss that pairs values by their rank in the batch (TRL's `aot_unpaired`) is
a sum while policy and reference agree, and none later: so some later batches are looked at too, and all of them where
something that carries a gradient is sorted, or numbers are along the first axis (`_sorts`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...names import names_by_id
from ..batch.row_segments import Runs
from ..model.state import inside_compiled
from ..sums.accumulator import Accumulator
from ..taps.exact import nodes_behind

LARGEST = 1 << 26  # numbers that a model gave; the test needs a few copies
SUM = "a sum over prompts"
COUPLED = "not a sum over prompts"
LATER = "not checked yet for terms of several prompts: no batch so far had two prompts with a gradient"
UNSEEN = (
    "not checked: no backward pass was seen to begin at a loss of one number; begin it by loss.backward() or "
    f"torch.autograd.grad (torch {torch.__version__} may not show a call of torch.autograd.backward)"
)
PARTS = "the parts that pass through each prompt's tokens, which add up to the gradient all the same"
REMEDY = (
    "make it a sum over prompts (what is averaged or normalised over a batch must not carry a gradient), or take "
    f"{PARTS}: coupled=True"
)


class CoupledLossError(ValueError):
    """The loss of a step is not a sum over its prompts."""


def is_sum(verdict: str | None) -> bool:
    """Whether a verdict is `SUM`, with or without words behind it."""
    return verdict is not None and verdict.startswith(SUM)


# What begins a backward pass, and the name of its first argument: the losses.
_BEGINS: dict[Any, str] = {
    torch.Tensor.backward: "self", torch.autograd.backward: "tensors", torch.autograd.grad: "outputs",
}  # fmt: skip


# What puts values in order, or says in which, and the place of its ``dim`` (-1 where none is given; msort: always 0).
_SORTS = {
    getattr(place, name): at
    for place in (torch, torch.Tensor)
    for name, at in (("sort", 1), ("argsort", 1), ("msort", 0), ("topk", 2))
}
_OF_TOKENS = frozenset({torch.topk, torch.Tensor.topk})  # routers choose experts by it, for each token


def _sorts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what a function puts in order may stand for several prompts: it carries a gradient, or its numbers are
    ordered along the first axis, whose order then may say who is paired with whom."""
    given = args[0] if args else kwargs.get("input")
    if func not in _SORTS or not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return False
    if given.requires_grad and func not in _OF_TOKENS:
        return True
    at = _SORTS[func]
    dim = kwargs.get("dim", args[at] if len(args) > at else -1) if at else 0
    return isinstance(dim, int) and given.ndim > 0 and dim in (0, -given.ndim) and given.shape[0] > 1


class _Backward(TorchFunctionMode):
    """Calls ``check(losses)`` before a backward pass; ``sorts``: whether something was put in order (`_sorts`)."""

    def __init__(self, check: Callable[[Sequence[torch.Tensor]], None]) -> None:
        super().__init__()
        self.check, self.sorts = check, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.sorts = self.sorts or _sorts(func, args, kwargs)
        if func in _BEGINS:
            losses = args[0] if args else kwargs[_BEGINS[func]]
            self.check([losses] if isinstance(losses, torch.Tensor) else losses)
        return func(*args, **kwargs)


class LossCheck:
    """Checks the losses of one batch: of every backward pass in it.

    ``verdict`` is the result as a sentence, of several losses the first that is not `SUM`; None: there was no backward
    pass; `LATER`: another batch may say more; `COUPLED` where an error said so. ``sorts``: the loss may depend on an
    order of prompts, which other batches change.

    Args:
        model: its outputs are examined.
        acc: the sums of its taps.
        runs: the segments of the batch.
    """

    def __init__(self, model: nn.Module, acc: Accumulator, runs: Runs) -> None:
        self.model, self.acc, self.runs = model, acc, runs
        self.verdict: str | None = None
        self.sorts = False
        self._outputs: list[torch.Tensor] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if inside_compiled(self.model):  # a mode of torch functions would have every graph compiled anew
            self.verdict = "not checked: modules are compiled"
            yield
            return

        def note(module: nn.Module, args: Any, y: Any) -> None:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._outputs += _tensors(y)

        try:
            with self.model.register_forward_hook(note), _Backward(self._try) as mode:
                yield
            self.sorts = mode.sorts
        finally:
            self._outputs = []

    # ------------------------------------------------------------------------------------------------ checks
    def _try(self, losses: Sequence[torch.Tensor]) -> None:
        if any(loss.numel() != 1 or loss.grad_fn is None for loss in losses):
            return
        with self.acc.deaf(), torch.enable_grad():  # taps are in the loss's graph already
            self._check(torch.stack([loss.reshape(()) for loss in losses]).sum() if losses[1:] else losses[0])

    def _check(self, loss: torch.Tensor) -> None:
        try:
            verdict = self._verdict_of(loss)
        except CoupledLossError:
            self.verdict = COUPLED
            raise
        if self.verdict is None or is_sum(self.verdict):
            self.verdict = verdict

    def _verdict_of(self, loss: torch.Tensor) -> str:
        ys = [y for y in self._outputs if self._per_token(y)]
        if not ys:
            return "not checked: the model's own forward gave nothing per token, or is part of a compiled one"
        beside = _weights_beside(loss, ys, self.model)
        if beside:
            raise CoupledLossError(
                f"the loss depends on {', '.join(beside[:5])} otherwise than through what the model gave for each "
                f"token (a term of all tokens together, such as experts' load balancing, or of the weights): {REMEDY}"
            )
        if sum(y.numel() for y in ys) > LARGEST:
            return f"not checked for terms of several prompts: more than {LARGEST:,} numbers in the outputs"
        return LATER if self.runs.present < 2 else self._second_derivatives(loss, ys)

    def _per_token(self, y: torch.Tensor) -> bool:
        segments = self.runs.segments
        if segments.token_views(y):
            return True
        return self.runs.rows and y.ndim >= 2 and y.shape[0] == segments.batch

    def _second_derivatives(self, loss: torch.Tensor, ys: list[torch.Tensor]) -> str:
        marks = [self._half(y) for y in ys]
        try:
            first = torch.autograd.grad(loss, ys, create_graph=True, allow_unused=True)
            terms = [
                (g * torch.where(mark, _pattern(y), 0.0)).sum()
                for g, y, mark in zip(first, ys, marks, strict=True)
                if g is not None and g.requires_grad
            ]
            if not terms:
                return f"{SUM} (linear in what the model gave)"
            if not (_any(first, marks) and _any(first, [~mark for mark in marks])):
                return LATER
            # The derivatives of one half of the prompts' gradients with respect to all outputs.
            half = torch.stack(terms).sum()
            second = torch.autograd.grad(half, ys, retain_graph=True, allow_unused=True)
        except RuntimeError as error:  # a function that has no second derivative (a fused loss)
            return f"not checked for terms of several prompts: {str(error).splitlines()[0]}"
        own = other = 0.0
        for h, mark in zip(second, marks, strict=True):
            if h is not None:
                size = h.detach().abs().nan_to_num(0.0, 0.0, 0.0)
                own = max(own, float(torch.where(mark, size, 0.0).max()))
                other = max(other, float(torch.where(mark, 0.0, size).max()))
        if other > 64 * torch.finfo(torch.float32).eps * own:
            raise CoupledLossError(
                f"the loss is not a sum over prompts: what it asks of one prompt changes with another's tokens (second "
                f"derivatives up to {other:.2g} between prompts, {own:.2g} within them): {REMEDY}"
            )
        return SUM

    def _half(self, y: torch.Tensor) -> torch.Tensor:
        """bool, of ``y``'s shape but for trailing axes of 1: the tokens of every second prompt."""
        runs, segments = self.runs, self.runs.segments
        place = runs.owner.unique(return_inverse=True)[1]  # a micro-batch may hold even ids alone
        odd = (place % 2 == 1).repeat_interleave(segments.offsets.diff()).to(y.device)
        views = segments.token_views(y)
        if views:
            return odd.view(next(iter(views.values())))
        return odd.view(segments.batch, segments.length)[:, 0].view(-1, *(1 for _ in y.shape[1:]))


def _any(gradients: Sequence[torch.Tensor | None], marks: list[torch.Tensor]) -> bool:
    """Whether a marked number's gradient is finite and not zero."""
    return any(
        bool((mark & g.isfinite() & (g != 0)).any())
        for g, mark in zip(gradients, marks, strict=True)
        if g is not None
    )


def _pattern(y: torch.Tensor) -> torch.Tensor:
    """One number between -1 and 1 for each number of ``y``, without a regularity that a loss could cancel."""
    places = torch.arange(y.numel(), device=y.device, dtype=torch.float32)
    return torch.sin(places * 12.9898 + 1.0).view(y.shape).to(y.dtype)


def _tensors(out: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad]


def _weights_beside(loss: torch.Tensor, ys: list[torch.Tensor], model: nn.Module) -> list[str]:
    """Names of parameters that ``loss`` reaches without passing through one of ``ys``."""
    names = names_by_id(model)
    behind = nodes_behind([loss], {y.grad_fn for y in ys})
    leaves = [id(node.variable) for node in behind if hasattr(node, "variable")]
    return list(dict.fromkeys(names[leaf] for leaf in leaves if leaf in names))
