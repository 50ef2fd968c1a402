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
    with_weight: bool,
    with_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, dy = _native.rows_view(x), _native.rows_view(dy)
    shape = offsets.numel() - 1, dy.shape[1]
    # The kernel writes float32 whatever torch's default dtype and device are.
    weight = torch.empty(shape, dtype=torch.float32, device="cpu") if with_weight else None
    bias = torch.empty(shape, dtype=torch.float32, device="cpu") if with_bias else None
    _native.native().norm_grad(
        _native.matrix(x),
        _native.matrix(dy),
        centered,
        eps,
        offsets.numel() - 1,
        offsets.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _native.threads(),
    )
    return weight, bias
