"""C++ kernel behind `norm_grad` and `bias_grad` (csrc/cpu/norm_grad.cpp)."""

from __future__ import annotations

import torch

from ... import _native


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
    x, dy = _native.rows_view(x), _native.rows_view(dy)
    _native.native().norm_grad(
        _native.matrix(x),
        _native.matrix(dy),
        centered,
        eps,
        offsets.numel() - 1,
        _native.pointer(offsets),
        _native.pointer(weight) if weight.numel() else 0,
        _native.pointer(bias) if bias.numel() else 0,
        _native.threads(),
    )
