"""Recognising a norm by what it computes, not by its class: transformers alone has dozens of RMSNorm classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")


def norm_of(module: nn.Module) -> tuple[bool, float] | None:
    """(centered, eps) if the module is ``f(x) = w * xhat(x) [+ b]`` or ``(c + w) * xhat(x) [+ b]``; else None.

    The slope of the output in each scale is measured on random rows in float32 and compared with
    ``xhat = (x - mean) * rsqrt(mean((x - mean)^2) + eps)``, with the mean (LayerNorm) and without (RMSNorm).
    """
    weight = getattr(module, "weight", None)
    names = {name for name, _ in module.named_parameters()}
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not names <= {"weight", "bias"}:
        return None
    eps = next(
        (float(getattr(module, n)) for n in _EPS_NAMES if isinstance(getattr(module, n, None), float)), None
    )
    if eps is None:
        return None
    # On the CPU and in float32 whatever torch's defaults are. Small rows tell where eps sits.
    normal = torch.empty(4, weight.numel(), dtype=torch.float32, device="cpu")
    normal.normal_(generator=torch.Generator().manual_seed(0))
    x = normal * normal.new_tensor([[1e-3], [0.1], [1.0], [30.0]])
    ones = {name: x.new_ones(weight.shape) for name in names}
    twos = {**ones, "weight": x.new_full(weight.shape, 2.0)}
    # A BatchNorm in training counts what it sees.
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    try:
        with torch.no_grad():
            slope = functional_call(module, {**twos, **buffers}, (x,))
            slope = slope - functional_call(module, {**ones, **buffers}, (x,))
    except Exception:  # not a function of one tensor; the code is not ours and may raise anything
        return None
    if not isinstance(slope, torch.Tensor) or slope.shape != x.shape:
        return None
    for centered in (False, True):
        shifted = x - x.mean(-1, keepdim=True) if centered else x
        xhat = shifted * torch.rsqrt(shifted.square().mean(-1, keepdim=True) + eps)
        if torch.allclose(slope.float(), xhat, rtol=1e-4, atol=1e-4):
            return centered, eps
    return None
