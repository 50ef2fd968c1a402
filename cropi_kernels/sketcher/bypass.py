"""Parameters that a model uses without calling their module: taps hear nothing of them, and half a gradient is wrong.

Mamba multiplies by ``dt_proj.weight`` itself, for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from .coverage import UncoveredParameterError
from .decoder import SplitModel, evaluating, few_tokens
from .taps import Tap


@contextlib.contextmanager
def calls(modules: Collection[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of ``modules`` that are called meanwhile."""
    called: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda module, *rest: called.add(module)) for m in modules]
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


def check_bypassed(split: SplitModel, taps: Mapping[nn.Module, Tap], called: Collection[nn.Module]) -> None:
    """``called``: the modules that a forward of the whole model called. What nobody uses has no gradient: no error.

    Raises:
        UncoveredParameterError: names the modules whose parameters are used all the same, and the remedy.
    """
    seen = {id(p) for module in called for p in module.parameters(recurse=False)}
    silent = [
        module
        for module in taps
        if module not in called and not any(id(p) in seen for p in module.parameters(recurse=False))
    ]
    if missed := _bypassed(split, silent):
        names = {taps[module].where: type(module).__name__ for module in missed}
        raise UncoveredParameterError(
            "these modules' parameters are used without calling the module, so that no tap sees them:\n"
            + "\n".join(f"  {name} ({kind})" for name, kind in names.items())
            + f"\nfreeze them, or leave them out by name: exclude=['{next(iter(names))}.*', ...]"
        )
