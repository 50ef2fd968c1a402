"""The CUDA C++ kernels: a C library (csrc/cuda/api.h) that is built only where a CUDA compiler is, and loaded late.

It takes addresses and a stream, knows no torch, and can be loaded without a driver. ``CROPI_CUDA_LIBRARY`` names a file
to load in place of the installed one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from . import _gpu, _native

ABI = 1
FILE = "libcropi_cuda.so"
_BUILD = "build them with `pip install . -C cmake.define.CROPI_CUDA=ON` (nvcc 12 or newer)"


class ProjectCall(ctypes.Structure):
    """``cropi::gpu::ProjectCall`` of csrc/cuda/project_shape.h, field by field."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("offset", ctypes.c_uint64),
        ("k0", ctypes.c_uint32),
        ("k1", ctypes.c_uint32),
        ("dim", ctypes.c_int64),
        ("nnz", ctypes.c_int32),
        ("keep", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("gaussian", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
    ]


def load(path: Path | str) -> Any:
    """The library in a file, its functions declared; OSError where the library is not this package's."""
    library = ctypes.CDLL(str(path))
    try:
        abi = int(library.cropi_abi())
    except AttributeError:
        raise OSError(f"{path} is not a library of CUDA kernels") from None
    if abi != ABI:
        raise OSError(f"{path} has interface {abi}, this package needs {ABI}: {_BUILD}")
    call = ctypes.POINTER(ProjectCall)
    library.cropi_error_text.argtypes, library.cropi_error_text.restype = [ctypes.c_int], ctypes.c_char_p
    library.cropi_project_workspace.argtypes = [call, ctypes.c_int]
    library.cropi_project_workspace.restype = ctypes.c_int64
    library.cropi_project.argtypes = [call, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    library.cropi_project.restype = ctypes.c_int
    return library


@functools.cache
def _installed() -> tuple[Any, str | None]:
    named = os.environ.get("CROPI_CUDA_LIBRARY")
    folders = [Path(__file__).parent]
    if _native._C is not None and _native._C.__file__:  # an editable install keeps what is compiled elsewhere
        folders.append(Path(_native._C.__file__).parent)
    paths = [Path(named)] if named else [folder / FILE for folder in folders]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return None, f"there is no {named}" if named else f"the CUDA kernels were not built: {_BUILD}"
    try:
        return load(path), None
    except OSError as error:
        return None, f"the CUDA kernels do not load: {error}"


def kernels() -> Any:
    """The loaded library, or an ImportError that says how to get it."""
    library, reason = _installed()
    if library is None:
        raise ImportError(reason)
    return library


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot serve these tensors, or None."""
    return _gpu.unsupported(*tensors) or _installed()[1]


def check(library: Any, error: int, what: str) -> None:
    if error:
        text = library.cropi_error_text(error).decode()
        raise RuntimeError(
            f"{what} was not launched: CUDA error {error} ({text}); CUDA_LAUNCH_BLOCKING=1 tells whose it is"
        )
