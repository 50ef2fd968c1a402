"""Whether Triton can serve a call.

Nothing here imports Triton until a call is about to use it: importing the package stays cheap on a laptop.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from . import _gpu

_INSTALL = "a CUDA build of torch brings it; otherwise `pip install 'triton>=3.6'` (Linux)"


@functools.cache
def import_error() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError) as error:
        return f"triton does not import ({error})"
    return None if found else f"triton is not installed: {_INSTALL}"


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot serve these tensors, or None."""
    return import_error() or _gpu.unsupported(*tensors)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
