"""Finds weights that the caller's code uses outside of their modules, and taps that are not called, in his batches.

The self-test runs the model alone. What is around it (a fused loss that multiplies by the head's weight itself, a
forward that was compiled for the shape of this batch before the taps came) shows only in the caller's own passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...names import listed, names_by_id
from ..attach.attachment import Attachment
from ..batch.segments import Segments
from ..model.sharded import units
from ..model.state import inside_compiled
from .selftest import SelfTestError


@contextlib.contextmanager
def watch_weights(plan: Attachment) -> Iterator[list[bool]]:
    """Refuse uses of covered parameters that no tap sees, in the forward and backward passes inside.

    The parameters have ``requires_grad`` inside, except while their own module runs. So a gradient that reaches one of
    them comes from a use outside of its module. This costs neither memory nor a weight gradient. Where modules are
    compiled, or sharded by FSDP2, nothing is watched. Where a graph is traced inside, the yielded list says so, and
    nothing is refused.

    Raises (from the backward pass inside):
        SelfTestError: names the parameter.
    """
    # A compiled module would run the graph that was made for trainable weights, which has no taps. FSDP2 puts other
    # tensors in the weights' places.
    traced: list[bool] = []
    if inside_compiled(plan.model) or units(plan.model):
        yield traced
        return
    names = names_by_id(plan.model)
    own = {
        module: [p for p, _ in tap.formed(module) if not p.requires_grad] for module, tap in plan.taps.items()
    }
    watched = list({id(p): p for parameters in own.values() for p in parameters}.values())

    def trainable(flag: bool) -> Callable[..., None]:
        def hook(module: nn.Module, *args: Any) -> None:
            # A graph that is being traced cannot change a flag: it forms weight gradients this one time.
            if torch.compiler.is_compiling():
                traced.append(True)
                return
            for p in own[module]:
                p.requires_grad_(flag)

        return hook

    def refuse(p: nn.Parameter) -> Callable[[torch.Tensor | None], None]:
        def hook(gradient: torch.Tensor | None) -> None:
            if gradient is not None and not traced and bool(gradient.any()):
                raise SelfTestError(
                    f"{names[id(p)]} has a gradient that did not pass through its module: this batch uses the weight "
                    f"itself, which no tap sees (or was compiled before the taps came). Call the module, leave the "
                    f"parameter out (exclude=[{names[id(p)]!r}, ...]), or leave out this test (verify=False)"
                )

        return hook

    before = [(p, p.grad) for p in watched]
    handles: list[Any] = []
    try:
        for p in watched:
            handles.append(p.requires_grad_(True).register_hook(refuse(p)))
        for module in own:
            handles.append(module.register_forward_pre_hook(trainable(False)))
            handles.append(module.register_forward_hook(trainable(True), always_call=True))
        yield traced
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in before:
            p.requires_grad_(False)
            p.grad = grad


def check_passes(plan: Attachment) -> None:
    """Check that the open batch has the sum of whole backward passes.

    Raises:
        SelfTestError: says why not.
    """
    if (problem := plan.acc.backwards.problem()) is not None:
        raise SelfTestError(problem)


def check_heard(plan: Attachment, heard: frozenset[str], segments: Segments, partly: bool) -> None:
    """Check that every tap that the self-test heard was heard in this batch too.

    ``partly``: the caller may have run a part of the model. Then a silent tap is an error only inside a compiled
    module.

    Raises:
        SelfTestError: names the modules.
    """
    expected = [(module, source) for module, source in plan.sources if source.where in heard]
    missing = [(module, source) for module, source in expected if source.silent(segments)]
    if not missing:
        return
    why = "their graphs were compiled before the taps came"
    if partly:
        compiled = inside_compiled(plan.model)
        missing = [(module, source) for module, source in missing if module in compiled]
    else:
        why += ", or the forward goes another way than a few tokens did (in train() some models leave layers out)"
    if missing:
        silent = listed([source.where or "the model itself" for _, source in missing], 10)
        raise SelfTestError(
            f"no gradient came by the taps of {silent} in this batch: {why}. Compile inside of "
            "the `with GradientSketcher(...)` block (torch.compiler.reset() forgets what was compiled), or leave out "
            "this test: verify=False"
        )
