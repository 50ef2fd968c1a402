"""Plain torch twin of `swiglu` and `swiglu_backward`, in any float dtype."""

from __future__ import annotations

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> None:
    """Fills ``h``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    h.copy_(torch.nn.functional.silu(gate.to(wide)) * up.to(wide))


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor
) -> None:
    """Fills ``dgate`` and ``dup``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    dh, gate, up = dh.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(gate)
    slope = s * (1 + gate * torch.sigmoid(-gate))
    dgate.copy_(dh * up * slope)
    dup.copy_(dh * (gate * s))
