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
    bounds = offsets.tolist()
    ranges = list(zip(bounds, bounds[1:]))
    weight = torch.stack([(dy[a:b] * xhat[a:b]).sum(0) for a, b in ranges]) if ranges else x.new_zeros(0, x.shape[1])
    bias = torch.stack([dy[a:b].sum(0) for a, b in ranges]) if with_bias else None
    return weight, bias
