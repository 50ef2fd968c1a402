"""Plain torch twin of `norm_grad`, in any float dtype."""

from __future__ import annotations

import torch


def norm_grad(
    x: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor, eps: float, centered: bool, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.to(wide), dy.to(wide)
    if centered:
        x = x - x.mean(-1, keepdim=True)
    xhat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return segment_sums(dy * xhat, offsets), segment_sums(dy, offsets) if with_bias else None


def segment_sums(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``out[s] = sum_{t in s} x[t]``, [segments, n]."""
    bounds = offsets.tolist()
    out = x.new_zeros(len(bounds) - 1, x.shape[1])
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        out[s] = x[begin:end].sum(0)
    return out
