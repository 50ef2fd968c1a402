"""Plain torch twin of `rms_norm` and `rms_norm_backward`, in any float dtype."""

from __future__ import annotations

import torch

from ..norm_grad.reference import segment_sums


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    return (weight.to(wide.dtype) * (wide * scale[:, None])).to(x.dtype), scale


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sums`` has no rows where ``offsets`` is None."""
    xhat = x.to(scale.dtype) * scale[:, None]
    wide = dy.to(scale.dtype)
    g = wide * weight.to(scale.dtype)
    dx = scale[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    sums = xhat.new_zeros(0, x.shape[1]) if offsets is None else segment_sums(wide * xhat, offsets)
    return dx.to(x.dtype), sums
