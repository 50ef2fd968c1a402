"""Modules whose tap does not see all that their parameters do.

Mamba multiplies by ``dt_proj.weight`` itself and never calls the module; the norms of later state-space layers are
called with a gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .accumulator import Accumulator
from .decoder import SplitModel, evaluating, few_tokens
from .segments import Segments
from .sharded import device_of
from .taps import Tap, count_tensors

ROWS = 3  # of the trial


@contextlib.contextmanager
def calls(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Those of ``modules`` that are called meanwhile, and the most tensors that a call was given."""
    called: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        called[module] = max(called.get(module, 0), count_tensors(args, kwargs))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _bypassed(split: SplitModel, modules: Collection[nn.Module]) -> list[nn.Module]:
    """Those of ``modules``, none of which the decoder calls, whose frozen parameters have a gradient all the same."""
    parameters = [(module, p) for module in modules for p in module.parameters(recurse=False)]
    if not parameters:
        return []
    try:
        for _, p in parameters:
            p.requires_grad_(True)
        with evaluating(split.decoder), torch.enable_grad():
            hidden = split.hidden(few_tokens(split))
        if not hidden.requires_grad:
            return []
        grads = torch.autograd.grad(hidden.sum(), [p for _, p in parameters], allow_unused=True)
    finally:
        for _, p in parameters:
            p.requires_grad_(False)
    found = {module: None for (module, _), grad in zip(parameters, grads, strict=True) if grad is not None}
    return list(found)


def _tried(split: SplitModel, acc: Accumulator) -> dict[str, str]:
    """What taps refuse in a pass over a few rows of two segments, by their names.

    The number of tokens is unlike any size of the model: what has another shape cannot fit by accident.
    """
    sizes = {n for p in split.decoder.parameters() for n in p.shape}
    length = next((n for n in (7, 11, 13, 17, 19) if not sizes & {n, ROWS * n}), 7)
    device = device_of(split.model)
    ids = torch.arange(ROWS * length, device=device).view(ROWS, length) % split.head.weight.shape[0]
    acc.begin(Segments.of(torch.tensor([0, 0, 1], device="cpu"), ROWS, length, 2), device)
    acc.refusals = {}
    try:
        with evaluating(split.decoder), torch.enable_grad():
            hidden = split.hidden(ids)
            if hidden.requires_grad:
                hidden.backward(torch.ones_like(hidden))
        return acc.refusals
    finally:
        acc.refusals = None
        acc.close()


def seen_wrong(
    split: SplitModel, taps: Mapping[nn.Module, Tap], called: Mapping[nn.Module, int], acc: Accumulator
) -> dict[nn.Module, str]:
    """Modules whose tap does not see all that their parameters do, and why.

    ``called``: what `calls` saw of a forward of the whole model. What nobody uses has no gradient: its tap is right.
    """
    seen = {id(p) for module in called for p in module.parameters(recurse=False)}
    silent = [
        module
        for module in taps
        if module not in called and not any(id(p) in seen for p in module.parameters(recurse=False))
    ]
    wrong = dict.fromkeys(_bypassed(split, silent), "used without calling the module, so that no tap sees it")
    refusals = _tried(split, acc)
    for module, tap in taps.items():
        if tap.where in refusals and called.get(module, 0) > 1:
            wrong[module] = "called with a second tensor (for example a gate)"
        elif tap.where in refusals:
            wrong[module] = "called on something else than every token once"
    return wrong
