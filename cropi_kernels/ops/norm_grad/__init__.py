"""Gradients of norm scales and of biases per segment, from a norm's input and output gradient."""

from __future__ import annotations

import torch

from ... import _native, dispatch
from .._checks import check_offsets, on_host
from .reference import norm_grad as norm_grad_reference
from .reference import segment_sums

__all__ = ["bias_grad", "norm_grad"]


def norm_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    *,
    centered: bool,
    with_bias: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``weight[s] = sum_{t in s} dy[t] * xhat[t]`` and, if asked, ``bias[s] = sum_{t in s} dy[t]``.

    ``xhat = (x - mean) / sqrt(mean((x - mean)^2) + eps)``, with mean 0 for RMSNorm (``centered=False``).

    Args:
        x, dy: input and output gradient of the norm, [tokens, n]; offsets: int64 [segments + 1].

    Returns float32 [segments, n] each (float64 for float64 inputs). Statistics are taken in
    float64, on a GPU in float32 from centred values.
    """
    if x.shape != dy.shape or x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)} but dy {tuple(dy.shape)}: both must be [tokens, n]")
    n_segments = check_offsets(offsets, x.shape[0])
    chosen = dispatch.choose("norm_grad", x, dy, backend=backend, without=_too_wide(x.shape[1]))
    if chosen == "triton":
        weight, bias = _triton_call(x, dy, offsets, eps, centered, True, with_bias)
        assert weight is not None
        return weight, bias
    if chosen != "cpu":
        return norm_grad_reference(x, dy, offsets, eps, centered, with_bias)
    return _native_call(x, dy, offsets, n_segments, eps, centered, True, with_bias)


def bias_grad(dy: torch.Tensor, offsets: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``bias[s] = sum_{t in s} dy[t]`` for ``dy`` [tokens, n]: float32 [segments, n] (float64 for float64 inputs)."""
    if dy.ndim != 2:
        raise ValueError(f"dy has shape {tuple(dy.shape)}: it must be [tokens, n]")
    n_segments = check_offsets(offsets, dy.shape[0])
    chosen = dispatch.choose("bias_grad", dy, backend=backend)
    if chosen == "triton":
        bias = _triton_call(dy, dy, offsets, 0.0, False, False, True)[1]
        assert bias is not None
        return bias
    if chosen != "cpu":
        return segment_sums(dy.to(torch.promote_types(dy.dtype, torch.float32)), offsets)
    bias = _native_call(dy, dy, offsets, n_segments, 0.0, False, False, True)[1]
    assert bias is not None
    return bias


def _too_wide(n: int) -> dict[str, str | None]:
    most = 8192  # a row has to fit into the registers of one program
    return {"triton": f"rows of {n} features; the kernel takes up to {most}" if n > most else None}


def _triton_call(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    from . import triton

    return triton.norm_grad(x, dy, offsets.to(dy.device), eps, centered, with_weight, with_bias)


def _native_call(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    n_segments: int,
    eps: float,
    centered: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, dy, offsets = _native.rows_view(x), _native.rows_view(dy), on_host(offsets, dy.shape[0])
    shape = n_segments, dy.shape[1]
    # The kernel writes float32 whatever torch's default dtype and device are.
    weight = torch.empty(shape if with_weight else (0, 0), dtype=torch.float32, device="cpu")
    bias = torch.empty(shape, dtype=torch.float32, device="cpu") if with_bias else None
    _native.native().norm_grad(
        _native.matrix(x),
        _native.matrix(dy),
        centered,
        eps,
        n_segments,
        offsets.data_ptr(),
        weight.data_ptr() if with_weight else 0,
        0 if bias is None else bias.data_ptr(),
        _native.threads(),
    )
    return weight, bias
