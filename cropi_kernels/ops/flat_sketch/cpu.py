"""C++ kernel behind `flat_sketch` (csrc/cpu/flat_sketch.cpp)."""

from __future__ import annotations

import torch

from ... import _native


def flat_sketch(
    x: torch.Tensor, key: tuple[int, int], keep_below: int, scale: float, out: torch.Tensor, offset: int
) -> None:
    _native.native().flat_sketch(
        _native.pointer(x),
        x.numel(),
        offset,
        *key,
        keep_below,
        scale,
        out.numel(),
        _native.pointer(out),
        _native.threads(),
    )
