"""Plain torch twin of `row_products`: float64, on any device."""

from __future__ import annotations

import torch


def unpack(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The stored numbers of packed rows, int16 [n, dim]."""
    count = 8 // bits
    shifts = torch.arange(count, device=rows.device, dtype=torch.int16) * bits
    entries = (rows.to(torch.int16)[..., None] >> shifts) & ((1 << bits) - 1)
    entries = entries.reshape(rows.shape[0], rows.shape[1] * count)
    return entries - 8 if bits == 4 else entries * 2 - 1


def row_products(
    rows: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    threads: int,
    out: torch.Tensor,
) -> None:
    """Fills ``out`` float64 [n, v + 1]: the products, and the squared lengths."""
    x = (unpack(rows, bits) if bits else rows).to(torch.float32)
    if scale is not None and x.numel():
        # In float32, as the rows are decoded: a scaled entry is rounded once.
        x = (x.view(*scale.shape, -1) * scale[..., None]).view_as(x)
    wide = x.double()
    out[:, :-1] = wide @ directions.double().T
    out[:, -1] = wide.square().sum(1)
