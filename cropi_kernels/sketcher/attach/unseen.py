"""Finds modules whose tap does not see every use of their parameters.

Mamba multiplies by ``dt_proj.weight`` itself and never calls the module; the norms of later state-space layers are
called with a gate.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...names import listed, module_name
from ..batch.segments import Segments
from ..model.hooks import hooked
from ..model.untouched import evaluating, thawed
from ..taps.taps import count_tensors
from .attachment import Attachment

Run = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def calls(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """The ``modules`` that are called inside, each with the largest number of tensors that a call was given."""
    called: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        called[module] = max(called.get(module, 0), count_tensors(args, kwargs))

    with hooked(m.register_forward_hook(note, with_kwargs=True) for m in modules):
        yield called


Owned = tuple[nn.Module, nn.Parameter]


def _bypassed(run: Run, ids: torch.Tensor, owned: Sequence[Owned]) -> list[nn.Module]:
    """The modules whose ``owned`` parameters have a gradient. No tap heard them, so they are used in another way."""
    if not owned:
        return []
    with thawed([p for _, p in owned]), torch.enable_grad():
        y = run(ids)
        if not y.requires_grad:
            return []
        grads = torch.autograd.grad(y.sum(), [p for _, p in owned], allow_unused=True)
    return list(
        dict.fromkeys(module for (module, _), grad in zip(owned, grads, strict=True) if grad is not None)
    )


@contextlib.contextmanager
def _cut(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Collects the linear layers, of any class, whose output has no graph although their input has one."""
    cut: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        has_graph = any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        lost = isinstance(y, torch.Tensor) and y.is_floating_point() and not y.requires_grad
        if torch.is_grad_enabled() and has_graph and lost and module not in cut:
            cut.append(module)

    with hooked(m.register_forward_hook(note) for m in model.modules() if hasattr(m, "out_features")):
        yield cut


def _tried(plan: Attachment, run: Run, ids: torch.Tensor) -> tuple[dict[str, str], Segments]:
    """Run a few rows of two segments: what taps refuse, by the taps' names, and the segments."""
    model, acc = plan.model, plan.acc
    batch, length = ids.shape
    rows = torch.arange(batch, device="cpu").clamp_min(1) - 1  # the first two rows are one segment
    segments = Segments.of(rows, batch, length, None)
    acc.begin(segments, ids.device)
    acc.refusals = {}
    try:
        with evaluating(model), torch.enable_grad(), _cut(model) as cut:
            y = run(ids)
            if y.requires_grad:
                y.backward(torch.ones_like(y))
        if cut:
            names = {m: module_name(n) for n, m in model.named_modules()}
            layers = listed([f"{names[m]} ({type(m).__name__})" for m in cut], 10)
            raise ValueError(
                f"no gradient passes through {layers}: quantised weights whose kernel has no "
                "backward (or a forward without gradients); nothing before them could be sketched. Load the weights in "
                "a format that adapters are trained on, for example bitsandbytes' or GPTQ's, or as bfloat16"
            )
        return acc.refusals, segments
    finally:
        acc.refusals = None
        acc.close()


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


def seen_wrong(
    plan: Attachment, run: Run, ids: torch.Tensor, called: Mapping[nn.Module, int]
) -> dict[nn.Module, str]:
    """Modules whose parameters do more than their tap sees, or whose gradient cannot be formed, and why.

    Args:
        run: what the model, or the part of it that will run, gives for token ids.
        ids: see `trial.few_rows`.
        called: what `calls` saw of a forward of the whole model, in the mode that the model is in and with the random
            numbers that ``run`` draws: in train() some models leave layers out by chance, others modules on purpose. A
            parameter that is not used has no gradient, and its tap is right.
    """
    taps = plan.taps
    seen = {id(p) for module in called for p in module.parameters(recurse=False)}
    silent = [
        (module, p)
        for module in taps
        if module not in called and not any(id(p) in seen for p in module.parameters(recurse=False))
        for p in module.parameters(recurse=False)
    ]
    bypassed = _bypassed(run, ids, silent)
    wrong = dict.fromkeys(bypassed, "used without calling the module, so that no tap sees it")
    refusals, segments = _tried(plan, run, ids)
    for module, tap in taps.items():
        if tap.where in refusals and called.get(module, 0) > 1:
            wrong[module] = "called with a second tensor (for example a gate)"
        elif tap.where in refusals:
            wrong[module] = "called on something else than every token once"
    # A few tokens reach some of a list's experts: the others are like them.
    alike = {_without_numbers(taps[module].where) for module in wrong if module in taps}
    for module, tap in taps.items():
        if tap.heard is not segments and module not in wrong and _without_numbers(tap.where) in alike:
            wrong[module] = "not called on a few tokens, and others of its name are on something else"
    unheard = [(one.chain[0], one.parameter) for one in plan.exact.parameters if one.heard is not segments]
    with evaluating(plan.model):
        unseen = _bypassed(run, ids, unheard)
    wrong |= dict.fromkeys(
        unseen, "no output of it, or of a module around it, holds every token of the batch once"
    )
    for one in plan.exact.parameters:
        if one.name in refusals:
            wrong[one.chain[0]] = refusals[one.name]
    return wrong
