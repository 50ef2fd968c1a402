"""RMSNorm and its gradients; the scale's gradient per segment comes from the same pass as that of the input."""

from __future__ import annotations

import torch

from ..._library import plain
from . import ops

__all__ = ["rms_norm", "rms_norm_backward"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y[t] = weight * x[t] * scale[t]`` with ``scale[t] = 1 / sqrt(mean(x[t]^2) + eps)``.

    Computed in float32 and rounded once (RMSNorm: Zhang and Sennrich, arXiv 1910.07467). No gradient is recorded:
    `rms_norm_backward` is it.

    Args:
        x: [tokens, n]; float32, bfloat16, float16 or float64.
        weight: [n], of the same dtype.
        eps: what is added to the mean square.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    Returns ``y`` [tokens, n] of that dtype, contiguous, and ``scale`` float32 [tokens] (float64 for float64 inputs).

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong.
        RuntimeError: the backend that was named cannot serve the call; says why.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)[1] * 12.5**0.5
    tensor([1.])
    """
    y, scale = ops.FORWARD(plain(x), plain(weight), eps, backend)
    return y, scale


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `rms_norm`, from the gradient ``dy`` of its ``y``: of ``x``, and of ``weight`` per segment.

    With ``xhat[t] = x[t] * scale[t]``::

        dx[t]   = scale[t] * (weight * dy[t] - xhat[t] * mean(weight * dy[t] * xhat[t]))
        sums[s] = sum_{t in s} dy[t] * xhat[t]

    Args:
        dy, x: [tokens, n]; weight: [n]; all of one dtype.
        scale: [tokens], what `rms_norm` gave.
        offsets: int64 [segments + 1] from 0 to the number of tokens: every token is in a segment. Where they are on a
            device, they are not checked, and ``dx`` of a token without a segment is NaN. None: no sums are wanted.
        backend: as of `rms_norm`.

    Returns ``dx`` [tokens, n], contiguous, and ``sums`` float32 [segments, n] (float64 for float64 inputs) or None.

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong, or the offset that is.
        RuntimeError: the backend that was named cannot serve the call; says why.
    """
    dx, sums = ops.BACKWARD(plain(dy), plain(x), plain(weight), plain(scale), offsets, backend)
    return dx, None if offsets is None else sums
