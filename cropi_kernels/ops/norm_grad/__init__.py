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
        x, dy: input and output gradient of the norm, [tokens, n]; float32, bfloat16, float16 or float64, also mixed.
        offsets: int64 [segments + 1], as `sketch_linear` takes them.
        eps: what the norm adds to the variance; centered: LayerNorm (True) or RMSNorm.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    Returns float32 [segments, n] each (float64 for float64 inputs). Statistics are taken in float64, on a GPU in
    float32 from centred values.

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong, or the offset that is less than its
            predecessor.
        RuntimeError: the backend that was named cannot serve the call; says why.
    """
    weight, bias = ops.NORM(plain(x), plain(dy), offsets, eps, centered, with_bias, backend)
    return weight, bias if with_bias else None


def bias_grad(dy: torch.Tensor, offsets: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``bias[s] = sum_{t in s} dy[t]`` for ``dy`` [tokens, n]: float32 [segments, n] (float64 for float64 inputs).

    Arguments and errors are those of `norm_grad`.

    >>> bias_grad(torch.ones(3, 2), torch.tensor([0, 1, 3]))
    tensor([[1., 1.],
            [2., 2.]])
    """
    return ops.BIAS(plain(dy), offsets, backend)
