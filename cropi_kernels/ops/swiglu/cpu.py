"""C++ kernels behind `swiglu` and `swiglu_backward` (csrc/cpu/swiglu.cpp)."""

from __future__ import annotations

import torch

from ... import _native


def swiglu(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> None:
    """Fills ``h``."""
    gate, up = _native.rows_view(gate), _native.rows_view(up)
    _native.native().swiglu(_native.matrix(gate), _native.matrix(up), _native.pointer(h), _native.threads())


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor
) -> None:
    """Fills ``dgate`` and ``dup``."""
    dh, gate, up = _native.rows_view(dh), _native.rows_view(gate), _native.rows_view(up)
    _native.native().swiglu_backward(
        _native.matrix(dh),
        _native.matrix(gate),
        _native.matrix(up),
        _native.pointer(dgate),
        _native.pointer(dup),
        _native.threads(),
    )
