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
    """``out[s, position(i)] += sign(i) * gradient[s, i]`` for per-segment gradients [segments, size].

    A vector has a few thousand numbers once per segment. They are added in order: on a GPU every number of the sketch
    gathers its own, because `index_add_` adds in the order of arrival there.
    """
    ops.SKETCH(plain(gradient), out, recipe_of(plan), backend)
    return out
