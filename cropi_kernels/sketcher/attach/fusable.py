"""Which modules the fused kernels may replace.

Nothing is guessed. A module's forward must be its class's own and the same code as Llama's in transformers, which most
decoders there repeat word for word; that code must compute the formula when it is tried on a few numbers (a later
release may change it); and the module must hold the expected parameters. Other code of the same formula may round
otherwise: OLMo 2 multiplies by the scale before it rounds to 16 bits.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

LLAMA = "transformers.models.llama.modeling_llama"
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")  # of a gated MLP
ACTIVATIONS = ("SiLU", "SiLUActivation")


def looks_like_norm(module: nn.Module) -> bool:
    """Whether the module's class is named as an RMSNorm, so that a user would expect it to be fused."""
    return any(base.__name__.endswith("RMSNorm") for base in type(module).__mro__)


def looks_like_gate(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS)


def against_norm(module: nn.Module) -> str | None:
    """Why the module is not ``y = weight * x / sqrt(mean(x^2) + variance_epsilon)`` for certain, or None."""
    if (reason := _against_code(module, "LlamaRMSNorm", _is_rms_norm)) is not None:
        return reason
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
    if weight is None or weight.ndim != 1 or len([*module.parameters()]) != 1 or not isinstance(eps, float):
        return "it holds other parameters than one scale, or no variance_epsilon"
    return None


def against_gate(module: nn.Module) -> str | None:
    """Why the module is not ``y = down_proj(silu(gate_proj(x)) * up_proj(x))`` for certain, or None."""
    if (reason := _against_code(module, "LlamaMLP", _is_swiglu)) is not None:
        return reason
    act: Any = module.act_fn
    if type(act).__name__ not in ACTIVATIONS or "forward" in vars(act) or not _is_silu(act):
        return f"its activation is {type(act).__name__}, not SiLU"
    if any(getattr(act, name) for name in vars(act) if name.endswith(("_hooks", "_pre_hooks"))):
        return "act_fn has hooks, which would not be called"
    return None


def _against_code(module: nn.Module, like: str, right: Callable[[Callable[..., Any]], bool]) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced"
    try:
        known = getattr(importlib.import_module(LLAMA), like).forward
    except (ImportError, AttributeError):
        return f"its code is compared with {like}'s, and transformers, which has it, does not import"
    forward = inspect.unwrap(type(module).forward)
    if not _same_code(forward, inspect.unwrap(known)):
        return f"its code, {forward.__module__}.{forward.__qualname__}, is not that of {like}"
    return None if right(forward) else f"{like} does something else than it did when this package was written"


def _same_code(one: Any, other: Any) -> bool:
    """Whether two functions compute the same: equal compiled code, without a closure, that calls the same torch."""

    def parts(function: Any) -> tuple[Any, ...]:
        code = function.__code__
        constants = [value for value in code.co_consts if value != function.__doc__]
        names = code.co_varnames[: code.co_argcount], code.co_names, code.co_freevars
        return code.co_code, *names, constants, function.__defaults__, function.__globals__.get("torch")

    return all(hasattr(f, "__code__") for f in (one, other)) and parts(one) == parts(other)


def _numbers() -> torch.Tensor:
    x = torch.linspace(-3.0, 4.0, 30, dtype=torch.float32, device="cpu").view(2, 3, 5)
    return x * x.new_tensor([1.0, 0.01, 20.0]).view(1, 3, 1)


@functools.cache
def _is_rms_norm(forward: Callable[..., Any]) -> bool:
    x, weight = _numbers(), torch.linspace(0.5, 2.0, 5, dtype=torch.float32, device="cpu")
    want = nn.functional.rms_norm(x, (5,), weight, 1e-3)
    return _gives(forward, SimpleNamespace(weight=weight, variance_epsilon=1e-3), x, want)


@functools.cache
def _is_swiglu(forward: Callable[..., Any]) -> bool:
    x = _numbers()
    parts = SimpleNamespace(
        gate_proj=lambda x: x + 0.5,
        up_proj=lambda x: x * x - 1,
        down_proj=lambda h: 3 * h - 2,
        act_fn=torch.sinh,
    )
    return _gives(forward, parts, x, 3 * (torch.sinh(x + 0.5) * (x * x - 1)) - 2)


def _gives(forward: Callable[..., Any], module: SimpleNamespace, x: torch.Tensor, want: torch.Tensor) -> bool:
    try:
        got = forward(module, x)
    except Exception:  # the code is not ours and may raise anything
        return False
    return isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-5)


def _is_silu(act: nn.Module) -> bool:
    z = _numbers()
    got = act(z)
    return isinstance(got, torch.Tensor) and torch.allclose(got, z * torch.sigmoid(z), rtol=1e-5)
