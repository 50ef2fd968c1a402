"""C++ kernel behind `row_products` (csrc/cpu/row_products.cpp)."""

from __future__ import annotations

import torch

from ... import _native

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
PACKED = {4: 4, 1: 5}


def row_products(
    rows: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    threads: int,
    out: torch.Tensor,
) -> None:
    """Fills ``out`` [n, v + 1]; ``threads`` 0 is torch's number."""
    rows, directions = rows.contiguous(), directions.contiguous()
    scale = None if scale is None else scale.contiguous()
    _native.native().row_products(
        _native.pointer(rows),
        PACKED[bits] if bits else KINDS[rows.dtype],
        rows.shape[0],
        directions.shape[1],
        rows.shape[1] * rows.element_size(),
        0 if scale is None else _native.pointer(scale),
        1 if scale is None else scale.shape[1],
        _native.pointer(directions),
        directions.shape[0],
        _native.pointer(out),
        threads or _native.threads(),
    )
