"""The operator ``cropi::sketch_vector``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from ...plan import vector_plan_of
from .._checks import check_devices, check_floating, check_out


def _sketch(gradient: torch.Tensor, out: torch.Tensor, plan: str, backend: str | None) -> None:
    _check(gradient, out, plan, backend)
    made = vector_plan_of(plan)
    chosen = dispatch.choose("sketch_vector", gradient, out, backend=backend)
    dispatch.kernels(__package__, chosen).sketch_vector(gradient, made, out)


def _check(gradient: torch.Tensor, out: torch.Tensor, plan: str, backend: str | None) -> None:
    made = vector_plan_of(plan)
    if gradient.ndim != 2 or gradient.shape[1] != made.size:
        shape = tuple(gradient.shape)
        raise ValueError(
            f"gradient has shape {shape}: it must be [segments, {made.size}], gradients of {made.name}"
        )
    check_floating("gradient", gradient)
    check_devices("gradient", gradient, out=out)
    check_out(out, gradient.shape[0], made.dim)


SKETCH = register(
    "sketch_vector(Tensor gradient, Tensor(a!) out, str plan, str? backend) -> ()",
    _sketch, _check, remedy="give fewer segments a call",
)  # fmt: skip
