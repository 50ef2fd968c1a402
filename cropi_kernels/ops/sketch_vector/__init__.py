"""The sketch of vector parameters: norm scales and biases."""

from __future__ import annotations

import torch

from ..._library import plain
from ...plan import VectorPlan, recipe_of
from . import ops

__all__ = ["sketch_vector"]


def sketch_vector(
    gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """``out[s, position(i)] += sign(i) * gradient[s, i]``: add the sketches of vectors that exist, one per segment.

    >>> plan = plan_vector(SketchSpec(), "model.norm.weight", 576)
    >>> out = sketch_vector(torch.ones(2, 576), plan, torch.zeros(2, 32768))
    >>> int(out[0].count_nonzero()), int(out[0].abs().sum())
    (576, 576)

    Args:
        gradient: float32, bfloat16 or float16 [segments, size]; rows may be strided.
        plan: `plan_vector` of the parameter.
        out: float32 [segments, plan.dim], contiguous, added to in place and returned. float64 only on the reference.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    The sums have one order everywhere: on a GPU every number of the sketch gathers its own, because `index_add_` adds
    in the order of arrival there.

    Raises:
        ValueError: names the argument, its value and the remedy.
        RuntimeError: the backend that was named cannot serve the call.
    """
    ops.SKETCH(plain(gradient), out, recipe_of(plan), backend)
    return out
