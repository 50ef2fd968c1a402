"""The sketch of vector parameters: norm scales and biases."""

from __future__ import annotations

import torch

from ...plan import VectorPlan
from .._checks import check_out

__all__ = ["sketch_vector"]


def sketch_vector(gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor) -> torch.Tensor:
    """``out[s, position(i)] += sign(i) * gradient[s, i]`` for per-segment gradients [segments, size].

    A vector has a few thousand numbers once per segment: one `index_add_`, in order, is already free.
    """
    if gradient.ndim != 2 or gradient.shape[1] != plan.size:
        shape = tuple(gradient.shape)
        raise ValueError(
            f"gradient has shape {shape}: it must be [segments, {plan.size}], gradients of {plan.name}"
        )
    check_out(out, gradient.shape[0], plan.dim)
    position = torch.from_numpy(plan.position).to(out.device)
    return out.index_add_(1, position, gradient.to(out.dtype) * torch.from_numpy(plan.sign).to(out))
