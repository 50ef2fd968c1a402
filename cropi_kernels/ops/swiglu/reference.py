"""Plain torch twin of `swiglu` and `swiglu_backward`, in any float dtype."""

from __future__ import annotations

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, wide = gate.dtype, torch.promote_types(gate.dtype, torch.float32)
    dh, gate, up = dh.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(gate)
    slope = s * (1 + gate * torch.sigmoid(-gate))
    return (dh * up * slope).to(dtype), (dh * (gate * s)).to(dtype)
