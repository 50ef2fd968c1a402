"""Which backend serves a call, and why not the others.

Order: ``cpu`` (compiled C++), then ``reference`` (plain torch, any device and dtype). A backend named by the caller, or
by the environment variable ``CROPI_KERNELS_BACKEND``, either serves the call or raises with its reason. An automatic
choice of the reference on a machine that could do better says so once.
"""

from __future__ import annotations

import os
import warnings

import torch

from . import _native

BACKENDS = ("cpu", "reference")
_said: set[str] = set()


def choose(op: str, *tensors: torch.Tensor, backend: str | None = None) -> str:
    """The backend for ``op`` on these tensors.

    Raises:
        ValueError: ``backend`` is not a known name.
        RuntimeError: the named backend cannot serve the call; the message gives its reason.
    """
    named = backend if backend is not None else os.environ.get("CROPI_KERNELS_BACKEND") or None
    if named is not None and named not in BACKENDS:
        raise ValueError(f"backend={named!r}: choose one of {', '.join(BACKENDS)}, or None for the best")
    if named == "reference":
        return named
    reason = _native.unsupported(*tensors)
    if reason is None:
        return "cpu"
    if named is not None:
        raise RuntimeError(f"backend={named!r} cannot run {op}: {reason}")
    if all(t.dtype != torch.float64 for t in tensors) and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"{op} runs on the plain torch reference, which forms whole gradients: {reason}", stacklevel=3
        )
    return "reference"


def explain(*tensors: torch.Tensor) -> str:
    """A line per backend: whether it would serve these tensors, or why not."""
    level = {1: "baseline", 3: "AVX2", 4: "AVX-512"}
    reason = _native.unsupported(*tensors)
    cpu = reason or f"serves the call ({level[_native.native().current_level()]} kernels)"
    note = "serves the call" if reason else "not chosen: slower, and it forms whole gradients"
    return f"cpu        {cpu}\nreference  {note}"
