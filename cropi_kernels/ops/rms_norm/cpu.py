"""C++ kernels behind `rms_norm` and `rms_norm_backward` (csrc/cpu/rms_norm.cpp)."""

from __future__ import annotations

import torch

from ... import _native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, scale: torch.Tensor) -> None:
    """Fills ``y`` and ``scale``."""
    x, weight = _native.rows_view(x), weight.contiguous()
    _native.native().rms_norm(
        _native.matrix(x),
        _native.pointer(weight),
        eps,
        _native.pointer(y),
        _native.pointer(scale),
        _native.threads(),
    )


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
    dx: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Fills ``dx`` and ``sums``; sums of no rows are not wanted, and are not computed."""
    if offsets is None:
        offsets = torch.tensor([0, x.shape[0]], device="cpu")
    dy, x = _native.rows_view(dy), _native.rows_view(x)
    weight, scale = weight.contiguous(), scale.contiguous()
    _native.native().rms_norm_backward(
        _native.matrix(dy),
        _native.matrix(x),
        _native.pointer(weight),
        _native.pointer(scale),
        _native.pointer(dx),
        offsets.numel() - 1,
        _native.pointer(offsets),
        _native.pointer(sums) if sums.numel() else 0,
        _native.threads(),
    )
