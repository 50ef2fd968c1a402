"""Plain torch twin of `norm_grad`, in any float dtype."""

from __future__ import annotations

import torch


def norm_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Fills ``weight`` and ``bias`` [segments, n]; one of no rows is not wanted, and is not computed."""
    x, dy = x.to(weight.dtype), dy.to(weight.dtype)
    if bias.numel():
        bias.copy_(segment_sums(dy, offsets))
    if not weight.numel():
        return
    if centered:
        x = x - x.mean(-1, keepdim=True)
    xhat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    weight.copy_(segment_sums(dy * xhat, offsets))


def segment_sums(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``out[s] = sum_{t in s} x[t]``, [segments, n]."""
    bounds = offsets.tolist()
    out = x.new_zeros(len(bounds) - 1, x.shape[1])
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        out[s] = x[begin:end].sum(0)
    return out
