"""Gradients of norm scales and of biases per segment, from a norm's input and output gradient."""

from __future__ import annotations

import torch

from ..._library import plain
from . import ops

__all__ = ["bias_grad", "norm_grad"]


def norm_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    *,
    centered: bool,
    with_bias: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``weight[s] = sum_{t in s} dy[t] * xhat[t]`` and, if asked, ``bias[s] = sum_{t in s} dy[t]``.

    ``xhat = (x - mean) / sqrt(mean((x - mean)^2) + eps)``, with mean 0 for RMSNorm (``centered=False``).

    Args:
        x, dy: input and output gradient of the norm, [tokens, n]; offsets: int64 [segments + 1].

    Returns float32 [segments, n] each (float64 for float64 inputs). Statistics are taken in
    float64, on a GPU in float32 from centred values.
    """
    weight, bias = ops.NORM(plain(x), plain(dy), offsets, eps, centered, with_bias, backend)
    return weight, bias if with_bias else None


def bias_grad(dy: torch.Tensor, offsets: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``bias[s] = sum_{t in s} dy[t]`` for ``dy`` [tokens, n]: float32 [segments, n] (float64 for float64 inputs)."""
    return ops.BIAS(plain(dy), offsets, backend)
