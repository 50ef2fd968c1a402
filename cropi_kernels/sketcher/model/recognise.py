"""Recognising a module by what it computes, not by its class: transformers alone has dozens of RMSNorm classes."""

from __future__ import annotations

import dis
import inspect
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..._library import no_autocast
from .precision import product_eps
from .replaced import forward_beneath, own_forward, parallel_of

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")


class _Bare(nn.Module):
    """A module's forward without the hooks on it. Taps see the output before other hooks do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor) -> Any:
        parallel = parallel_of(self.module)
        return (parallel.forward if parallel else self.module.forward)(*args)


def _call(module: nn.Module, tensors: dict[str, torch.Tensor], *args: torch.Tensor) -> Any:
    """What the module computes of ``args`` with other parameters and buffers; may raise anything. Autocast does not
    apply: a layer that is not recognised under it would have other coordinates there."""
    if any(x.is_meta for x in args):
        raise NotImplementedError("on meta there are no numbers to compare")
    with torch.no_grad(), no_autocast(*args):
        return functional_call(_Bare(module), {f"module.{name}": x for name, x in tensors.items()}, args)


def _forward_of(module: nn.Module) -> Any:
    """The function that the module runs, without the wrappers of accelerate (which moves tensors) and of a
    tensor-parallel plan (which spreads them over ranks)."""
    forward = vars(module).get("_old_forward") if hasattr(module, "_hf_hook") else None
    if forward is None:
        parallel = parallel_of(module)
        forward = parallel.forward if parallel else own_forward(module) or type(module).forward
    return getattr(forward, "__func__", forward)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear that does nothing but ``y = x W^T + b``.

    A subclass (a router) may do more, and so may a forward that was put in place of the class's own.
    """
    # nn.MultiheadAttention takes its weight and never calls it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return _forward_of(module) is nn.Linear.forward or _multiplies(module, module.weight, False)


def is_router(module: nn.Module) -> bool:
    """Whether the module's own code multiplies by its weight, whatever it does with the product.

    The names in the code tell. A module that holds a weight for others to use is no router.
    """
    weight, names = getattr(module, "weight", None), _names_in_forward(module)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or own_forward(module):
        return False
    if isinstance(module, nn.Linear) and inspect.unwrap(type(module).forward) is nn.Linear.forward:
        return False  # not linear all the same: nn.MultiheadAttention takes its weight and never calls it
    return names.count("linear") > 0 or isinstance(module, nn.Linear) and names.count("forward") > 0


def uses_weight_once(module: nn.Module) -> bool:
    """Whether that product is the only use of the weight in the code. A `RouterTap` checks it in every call."""
    names = _names_in_forward(module)
    uses = names.count("weight"), names.count("linear"), names.count("forward")
    return uses[:2] == (1, 1) or isinstance(module, nn.Linear) and uses == (0, 0, 1)


def _names_in_forward(module: nn.Module) -> list[str]:
    """Attributes and globals that the code of the module's forward reads, as often as it does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return []
    return [i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")]


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer with its weight stored [in, out]. By shape: transformers is not a dependency."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return (
        named and isinstance(weight, torch.Tensor) and weight.ndim == 2 and _multiplies(module, weight, True)
    )


def _multiplies(module: nn.Module, weight: torch.Tensor, transposed: bool) -> bool:
    """Whether the module computes ``x W^T + b`` (``x W + b``), tried on a few rows."""
    cols, rows = weight.shape if transposed else weight.T.shape
    x = torch.empty(7, cols, dtype=torch.float32, device="cpu")
    x = x.normal_(generator=torch.Generator().manual_seed(0)).to(weight)
    x, w = x[:6], x[6]
    # A weight of our own, expanded and so without memory: the model's may be zero.
    tried = w.unsqueeze(1).expand(cols, rows) if transposed else w.expand(rows, cols)
    got = _rows_apart(module, {"weight": tried}, x)
    want = (x.double() @ w.double()).unsqueeze(1).expand(6, rows)
    bias = getattr(module, "bias", None)
    want = want if bias is None else want + bias.detach()
    if got is None or got.shape != want.shape:
        return False
    tolerance = max(1e-4, 4 * product_eps(weight))  # a GPU may round float32 operands to tf32
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def _rows_apart(module: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """What the module computes of rows ``x`` [tokens, n].

    None where that is not a tensor, or differs for ``x`` as [2, tokens / 2, n]: such a module may mix tokens.
    """
    try:
        got = _call(module, tensors, x)
    except Exception:  # the module needs more than one tensor; its code may raise anything
        return None
    if not isinstance(got, torch.Tensor):
        return None
    try:
        batched = _call(module, tensors, x.unflatten(0, (2, -1)))
    except Exception:  # a module that sees all tokens in one axis
        return got.detach()
    if not isinstance(batched, torch.Tensor) or batched.shape[:-1] != (2, len(x) // 2):
        return None
    same = torch.allclose(
        batched.flatten(0, 1).float(), got.float(), rtol=1e-2, atol=1e-2 * float(got.abs().max())
    )
    return got.detach() if same else None


def embedding_scale(module: nn.Embedding) -> float | None:
    """What the module multiplies a looked-up row by (Gemma), or None if its output is something else."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    weight = module.weight
    row = torch.tensor([0.0, 1.0, -2.0, 4.0], dtype=weight.dtype, device=weight.device)
    row = row.repeat(-(-weight.shape[1] // 4))[: weight.shape[1]]
    ids = torch.arange(min(2, weight.shape[0]), device=weight.device)  # two rows: one may be the padding
    try:  # on a weight of our own, expanded and so without memory: the model's may be zero where we look
        got = _call(module, {"weight": row.expand(weight.shape)}, ids)
        scale = _call(module, {"weight": torch.ones_like(row).expand(weight.shape)}, ids)
    except Exception:  # the module needs more than ids: OPT's positions raise an IndexError
        return None
    if not isinstance(got, torch.Tensor) or got.shape != (len(ids), len(row)):
        return None
    factor = scale[0, 0]
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
    given = (getattr(module, name, None) for name in _EPS_NAMES)
    eps = next((float(value) for value in given if isinstance(value, float)), None)
    if eps is None:
        return None
    if (centered := _of_liger(module)) is not None:
        return centered, eps
    # On the CPU and in float32 whatever torch's defaults are. Small rows tell where eps sits.
    normal = torch.empty(4, weight.numel(), dtype=torch.float32, device="cpu")
    normal.normal_(generator=torch.Generator().manual_seed(0))
    x = normal * normal.new_tensor([[1e-3], [0.1], [1.0], [30.0]])
    ones = {name: x.new_ones(weight.shape) for name in names}
    twos = {**ones, "weight": x.new_full(weight.shape, 2.0)}
    # A BatchNorm in training counts what it sees.
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    high, low = (_rows_apart(module, {**scales, **buffers}, x) for scales in (twos, ones))
    if high is None or low is None or high.shape != x.shape or low.shape != x.shape:
        return None
    slope = high - low
    for centered in (False, True):
        shifted = x - x.mean(-1, keepdim=True) if centered else x
        xhat = shifted * torch.rsqrt(shifted.square().mean(-1, keepdim=True) + eps)
        if torch.allclose(slope.float(), xhat, rtol=1e-4, atol=1e-4):
            return centered, eps
    return None


def _of_liger(module: nn.Module) -> bool | None:
    """Whether the module, one of Liger's norms, is centered; None: it is not one of them.

    Their kernels run on a GPU only, and the trial of `norm_of` on a CPU. The formulas are the same, ``offset`` is c.
    """
    forward = _forward_of(module)
    if not str(getattr(forward, "__module__", "")).startswith("liger_kernel."):
        return None
    kind = str(getattr(forward, "__qualname__", "")).split(".")[0]
    return {"LigerRMSNorm": False, "LigerLayerNorm": True}.get(kind)


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the module's forward has one argument: a norm that has more (a gate) may do more than normalise."""
    try:
        arguments = inspect.signature(forward_beneath(module)).parameters.values()
    except (TypeError, ValueError):  # not written in Python: it will be seen to when it is called
        return True
    named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    return len(named) == 1
