"""Which backend serves a call, and why not the others.

Order: ``cuda`` (compiled CUDA C++, where an op has such a kernel and it was built), ``triton`` (NVIDIA GPUs from
compute capability 8.0 on), ``cpu`` (compiled C++), then ``reference`` (plain torch, any device and dtype); `project`
puts ``triton`` first for the calls in which it is faster. A backend named by the caller, or by the environment variable
``CROPI_KERNELS_BACKEND``, either serves the call or raises with its reason. An automatic choice of the reference on a
machine that could do better says so once.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import _cuda, _native, _triton
from ._level import level_of_caller

BACKENDS = ("cuda", "triton", "cpu", "reference")
_said: set[str] = set()


def reasons_against(
    *tensors: torch.Tensor, without: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """Why each backend cannot serve these tensors, None where it can; ``without`` adds an op's own reasons.

    An op that has a CUDA C++ kernel says so by naming ``cuda`` there, with None where nothing speaks against it.
    """
    own = without or {}
    return {
        "cuda": own["cuda"] if "cuda" in own else "no CUDA C++ kernel of this op exists",
        "triton": own.get("triton") or _triton.unsupported(*tensors),
        "cpu": own.get("cpu") or _native.unsupported(*tensors),
        "reference": None,
    }


def checked(backend: str | None) -> str | None:
    """``backend``, for the best one None.

    Raises:
        ValueError: ``backend`` is not a known name.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}, or None for the best")
    return backend


def named(backend: str | None) -> str | None:
    """The backend that the caller or the environment names."""
    return checked(backend if backend is not None else os.environ.get("CROPI_KERNELS_BACKEND") or None)


def choose(
    op: str,
    *tensors: torch.Tensor,
    backend: str | None = None,
    without: Mapping[str, str | None] | None = None,
    fallback: bool = True,
    order: Sequence[str] = ("cuda", "triton"),
    remedy: str = "move or cast the tensor, or ask for plain torch by backend='reference'",
) -> str:
    """The backend for ``op`` on these tensors; on a device the first that serves, in this ``order``.

    Raises:
        ValueError: ``backend`` is not a known name.
        RuntimeError: the named backend cannot serve the call, or none was named, no kernel can, and the reference is no
            ``fallback`` for them; the message gives the reason.
    """
    asked = named(backend)
    if asked == "reference":
        return asked
    on_host = not tensors or tensors[0].device.type == "cpu"
    if asked is None and on_host and not (without or {}).get("cpu") and _native.unsupported(*tensors) is None:
        return "cpu"  # what nearly every call on a CPU comes to; the others' reasons would cost more than its kernel
    if asked is None and not on_host and not without and _triton.unsupported(*tensors) is None:
        return "triton"  # and on a device; an op with other kernels names them in `without`
    against = reasons_against(*tensors, without=without)
    if asked is not None:
        if against[asked] is not None:
            raise RuntimeError(f"backend={asked!r} cannot run {op}: {against[asked]}")
        return asked
    order = ("cpu",) if on_host else order  # the interpreter serves tests, and only by name
    for name in order:
        if against[name] is None:
            return name
    reason = str(against["cpu" if on_host else "triton"])
    if not on_host and "cuda" in (without or {}) and against["cuda"] != reason:
        reason += f"; CUDA C++: {against['cuda']}"
    if not fallback:
        raise RuntimeError(f"no kernel of {op} serves this call: {reason}; {remedy}")
    if all(t.dtype != torch.float64 for t in tensors) and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"{op} runs on the plain torch reference, slowly and with much memory: {reason}",
            stacklevel=level_of_caller(),
        )
    return "reference"


@functools.cache  # looked up at every call of an op, a search of modules takes 4 µs
def kernels(package: str, backend: str) -> Any:
    """The module of an op's folder that is named as the backend, imported when it first serves: Triton takes time."""
    return importlib.import_module(f".{backend}", package)


def explain(*tensors: torch.Tensor) -> str:
    """A line per backend: whether it would serve these tensors, or why not. To be printed.

    >>> print(explain(torch.ones(4, 4)))                                   # doctest: +SKIP
    cuda       the tensor is on cpu, not on a CUDA device
    triton     the tensor is on cpu, not on a CUDA device
    cpu        serves the call (AVX2 kernels)
    reference  not chosen: slower, and it forms whole gradients

    >>> "cpu" in str(explain(torch.ones(2, 2)))
    True
    """
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"explain({tensor!r}): give the tensors of the call in question")
    if reason := next(filter(None, map(_native.not_plain, tensors)), None):
        return f"none of {', '.join(BACKENDS)} serves the call: {reason}"
    against = reasons_against(*tensors, without={"cuda": _cuda.unsupported(*tensors)})
    if against["cpu"] is None:
        level = {1: "baseline", 3: "AVX2", 4: "AVX-512"}
        serves = f"serves the call ({level[_native.native().current_level()]} kernels)"
    else:
        serves = against["cpu"]
    better = any(against[name] is None for name in ("cuda", "triton", "cpu"))
    note = "not chosen: slower, and it forms whole gradients" if better else "serves the call"
    lines = {
        "cuda": against["cuda"] or "serves project; the other ops have no CUDA C++ kernel",
        "triton": against["triton"] or "serves the call",
        "cpu": serves,
        "reference": note,
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())
