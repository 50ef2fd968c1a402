"""Recognising a module by what it computes, not by its class: transformers alone has dozens of RMSNorm classes."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear, and ``y = x W^T + b`` all that it does: a subclass (a router) may do more."""
    # nn.MultiheadAttention takes its weight and never calls it.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    weight = module.weight
    x = torch.empty(4, weight.shape[1], dtype=torch.float32, device="cpu")
    x = x.normal_(generator=torch.Generator().manual_seed(0)).to(weight)
    try:  # on a weight of our own, expanded and so without memory: the model's may be zero
        with torch.no_grad():
            got = functional_call(module, {"weight": x[3].expand_as(weight)}, (x[:3],))
    except Exception:  # not a function of one matrix; the code is not ours and may raise anything
        return False
    want = nn.functional.linear(x[:3].float(), x[3:].float()).expand(3, weight.shape[0])
    want = want if module.bias is None else want + module.bias.detach().float()
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return False
    tolerance = 3e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((got.detach().float() - want).abs().max() <= tolerance * want.abs().max())


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer with its weight stored [in, out]. By shape: transformers is no dependency."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def embedding_scale(module: nn.Embedding) -> float | None:
    """What the module multiplies a looked-up row by (Gemma), or None if its output is something else."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    weight = module.weight
    row = torch.tensor([0.0, 1.0, -2.0, 4.0], dtype=weight.dtype, device=weight.device)
    row = row.repeat(-(-weight.shape[1] // 4))[: weight.shape[1]]
    ids = torch.arange(min(2, weight.shape[0]), device=weight.device)  # two rows: one may be the padding
    try:  # on a weight of our own, expanded and so without memory: the model's may be zero where we look
        with torch.no_grad():
            got = functional_call(module, {"weight": row.expand_as(weight)}, (ids,))
            scale = functional_call(module, {"weight": torch.ones_like(row).expand_as(weight)}, (ids,))
    except Exception:  # not a function of ids alone: OPT's positions raise an IndexError
        return None
    if not isinstance(got, torch.Tensor) or got.shape != (len(ids), len(row)):
        return None
    factor = scale[0, 0].detach()  # hooks on the module may have asked for gradients
    return float(factor) if torch.equal(got, (row * factor).expand_as(got)) else None


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


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the module's forward has one argument: a norm that has more (a gate) may do more than normalise."""
    try:
        arguments = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python: it will be seen to when it is called
        return True
    named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    return len(named) == 1
