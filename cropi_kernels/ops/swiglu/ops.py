"""The operators ``cropi::swiglu`` and ``cropi::swiglu_backward``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from ...plan import matrix_plan_of
from .._checks import check_devices, check_floating
from ..sketch_linear.ops import check_unfolded, fold

REMEDY = "give fewer tokens a call (a smaller micro-batch)"


def _forward(
    gate: torch.Tensor, up: torch.Tensor, plan: str | None, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    h, folded = _forward_fake(gate, up, plan, backend)
    made = None if plan is None else matrix_plan_of(plan)
    chosen = dispatch.choose("swiglu", gate, up, backend=backend)
    kernels = dispatch.kernels(__package__, chosen)
    if chosen == "triton":  # one kernel makes both
        kernels.swiglu(gate, up, made, h, folded)
        return h, folded
    kernels.swiglu(gate, up, h)
    return h, folded if made is None else fold(h, made, False, backend)


def _forward_fake(
    gate: torch.Tensor, up: torch.Tensor, plan: str | None, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(gate=gate, up=up)
    width = 0
    if plan is not None:
        made = matrix_plan_of(plan)
        check_unfolded(gate, made, False)
        if made.col_fold is None:
            raise ValueError(
                f"the plan of {made.name} folds no inputs: give no plan, or one of a narrower spec"
            )
        width = made.folded_cols
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0] if width else 0, width)


def _backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = _backward_fake(dh, gate, up, backend)
    chosen = dispatch.choose("swiglu_backward", dh, gate, up, backend=backend)
    dispatch.kernels(__package__, chosen).swiglu_backward(dh, gate, up, dgate, dup)
    return dgate, dup


def _backward_fake(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(gate=gate, up=up, dh=dh)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _check(gate: torch.Tensor, **others: torch.Tensor) -> None:
    if gate.ndim != 2:
        raise ValueError(f"gate has shape {tuple(gate.shape)}: it must be [tokens, n]")
    check_floating("gate", gate)
    for name, x in others.items():
        if x.shape != gate.shape or x.dtype != gate.dtype:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} but gate {gate.dtype} {tuple(gate.shape)}: they must be alike"
            )
        check_floating(name, x)
    check_devices("gate", gate, **others)


FORWARD = register(
    "swiglu(Tensor gate, Tensor up, str? plan, str? backend) -> (Tensor h, Tensor folded)",
    _forward, _forward_fake, remedy=REMEDY,
)  # fmt: skip
BACKWARD = register(
    "swiglu_backward(Tensor dh, Tensor gate, Tensor up, str? backend) -> (Tensor dgate, Tensor dup)",
    _backward, _backward_fake, remedy=REMEDY,
)  # fmt: skip
