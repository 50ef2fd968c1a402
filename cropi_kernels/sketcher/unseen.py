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

from .decoder import SplitModel, evaluating, few_tokens
from .taps import Tap, count_tensors


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


def seen_wrong(
    split: SplitModel, taps: Mapping[nn.Module, Tap], called: Mapping[nn.Module, int]
) -> dict[nn.Module, str]:
    """Modules whose tap does not see all that their parameters do, and why; ``called``: what `calls` saw of a forward
    of the whole model. What nobody uses has no gradient, and its tap is right."""
    seen = {id(p) for module in called for p in module.parameters(recurse=False)}
    silent = [
        module
        for module in taps
        if module not in called and not any(id(p) in seen for p in module.parameters(recurse=False))
    ]
    wrong = dict.fromkeys(_bypassed(split, silent), "used without calling the module, so that no tap sees it")
    wrong |= {m: "called with a second tensor (for example a gate)" for m, n in called.items() if n > 1}
    return wrong
