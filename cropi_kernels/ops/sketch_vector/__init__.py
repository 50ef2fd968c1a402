"""The sketch of vector parameters: norm scales and biases."""

from __future__ import annotations

import torch

from ... import _native, dispatch
from ...plan import VectorPlan
from .._checks import check_out
from .reference import sketch_vector as sketch_vector_reference

__all__ = ["sketch_vector"]


def sketch_vector(
    gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """``out[s, position(i)] += sign(i) * gradient[s, i]`` for per-segment gradients [segments, size].

    A vector has a few thousand numbers once per segment. They are added in order: on a GPU every number of the sketch
    gathers its own, because `index_add_` adds in the order of arrival there.
    """
    if gradient.ndim != 2 or gradient.shape[1] != plan.size:
        shape = tuple(gradient.shape)
        raise ValueError(
            f"gradient has shape {shape}: it must be [segments, {plan.size}], gradients of {plan.name}"
        )
    check_out(out, gradient.shape[0], plan.dim)
    chosen = dispatch.choose("sketch_vector", gradient, out, backend=backend)
    if chosen == "triton":
        from . import triton

        triton.sketch_vector(gradient, plan, out)
        return out
    if chosen == "reference":
        return sketch_vector_reference(gradient, plan, out)
    gradient = _native.rows_view(gradient.to(torch.float32))
    _native.native().sketch_vector(
        gradient.data_ptr(),
        gradient.shape[0],
        plan.size,
        gradient.stride(0),
        _native.address(plan.position),
        _native.address(plan.sign),
        out.data_ptr(),
        out.stride(0),
    )
    return out
