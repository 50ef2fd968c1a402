"""The operators ``cropi::norm_grad`` and ``cropi::bias_grad``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from .._checks import check_devices, check_floating, check_offset_values, check_offsets, on_device, on_host
from . import cpu, reference

WIDEST = 8192  # features: a row has to fit into the registers of one program
REMEDY = "give fewer tokens a call (a smaller micro-batch), or fewer segments"


def _norm(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    with_bias: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_norm(x, dy, offsets)
    check_offset_values(offsets, x.shape[0])
    n = x.shape[1]
    without = {"triton": f"rows of {n} features; the kernel takes up to {WIDEST}" if n > WIDEST else None}
    chosen = dispatch.choose("norm_grad", x, dy, backend=backend, without=without)
    if chosen == "triton":
        from . import triton

        weight, bias = triton.norm_grad(x, dy, on_device(offsets, x.device), eps, centered, True, with_bias)
    elif chosen == "cpu":
        weight, bias = cpu.norm_grad(x, dy, on_host(offsets, x.shape[0]), eps, centered, True, with_bias)
    else:
        weight, bias = reference.norm_grad(x, dy, offsets, eps, centered, with_bias)
    assert weight is not None
    return weight, torch.empty(0, dtype=weight.dtype, device=weight.device) if bias is None else bias


def _norm_fake(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    with_bias: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_segments = _check_norm(x, dy, offsets)
    weight = _sums(x, n_segments)
    return weight, _sums(x, n_segments) if with_bias else weight.new_empty(0)


def _bias(dy: torch.Tensor, offsets: torch.Tensor, backend: str | None) -> torch.Tensor:
    _check_bias(dy, offsets)
    check_offset_values(offsets, dy.shape[0])
    chosen = dispatch.choose("bias_grad", dy, backend=backend)
    if chosen == "triton":
        from . import triton

        bias = triton.norm_grad(dy, dy, on_device(offsets, dy.device), 0.0, False, False, True)[1]
    elif chosen == "cpu":
        bias = cpu.norm_grad(dy, dy, on_host(offsets, dy.shape[0]), 0.0, False, False, True)[1]
    else:
        bias = reference.segment_sums(dy.to(_wide(dy)), offsets)
    assert bias is not None
    return bias


def _bias_fake(dy: torch.Tensor, offsets: torch.Tensor, backend: str | None) -> torch.Tensor:
    return _sums(dy, _check_bias(dy, offsets))


def _check_norm(x: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor) -> int:
    if x.ndim != 2 or x.shape != dy.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but dy {tuple(dy.shape)}: both must be [tokens, n]")
    check_floating("x", x)
    check_floating("dy", dy)
    check_devices("x", x, dy=dy)
    return check_offsets(offsets)


def _check_bias(dy: torch.Tensor, offsets: torch.Tensor) -> int:
    if dy.ndim != 2:
        raise ValueError(f"dy has shape {tuple(dy.shape)}: it must be [tokens, n]")
    check_floating("dy", dy)
    return check_offsets(offsets)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sums(x: torch.Tensor, n_segments: int) -> torch.Tensor:
    return x.new_empty(n_segments, x.shape[1], dtype=_wide(x))


NORM = register(
    "norm_grad(Tensor x, Tensor dy, Tensor offsets, float eps, bool centered, bool with_bias, str? backend) "
    "-> (Tensor weight, Tensor bias)",
    _norm, _norm_fake, remedy=REMEDY,
)  # fmt: skip
BIAS = register(
    "bias_grad(Tensor dy, Tensor offsets, str? backend) -> Tensor", _bias, _bias_fake, remedy=REMEDY
)
