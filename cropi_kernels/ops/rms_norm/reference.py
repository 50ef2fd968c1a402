"""Plain torch twin of `rms_norm` and `rms_norm_backward`, in any float dtype."""

from __future__ import annotations

import torch

from ..norm_grad.reference import segment_sums


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, scale: torch.Tensor) -> None:
    """Fills ``y`` and ``scale``."""
    wide = x.to(scale.dtype)
    scale.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
    y.copy_(weight.to(wide.dtype) * (wide * scale[:, None]))


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
    dx: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Fills ``dx``, and with ``offsets`` ``sums``."""
    xhat = x.to(scale.dtype) * scale[:, None]
    wide = dy.to(scale.dtype)
    g = wide * weight.to(scale.dtype)
    dx.copy_(scale[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
    if offsets is not None:
        sums.copy_(segment_sums(wide * xhat, offsets))
