"""What a GPU kernel needs of a device, whoever compiled it: whether it can serve, and how a launch gets there."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch

MIN_CAPABILITY = (8, 0)  # tensor cores with bfloat16, asynchronous copies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _asked() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def interpreting() -> bool:
    """True in a process that runs kernels in Triton's interpreter, or in an emulator that stands in for it, on CPU
    tensors (tests only)."""
    return _asked()


def _interpreter_reason(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Triton's interpreter holds bfloat16 as integers of 16 bits: it multiplies, adds and compares those, without an
    error. An emulator that stands in for it does not, and has no such variable set."""
    if _asked() and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return (
            "Triton's interpreter (TRITON_INTERPRET is set) computes bfloat16 wrongly, without an error: give float32 "
            "or float16, or unset TRITON_INTERPRET and use a GPU"
        )
    return None


@functools.cache
def _device_reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name, need = torch.cuda.get_device_name(index), "{}.{}".format(*MIN_CAPABILITY)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need {need} or newer: use "
            "such a GPU, or the CPU"
        )
    return None


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why no GPU kernel can serve these tensors, or None."""
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            return f"the tensors are on {tensors[0].device} and on {tensor.device}: move them to one device"
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} is not one of float32, bfloat16, float16"
        if tensor.device.type != "meta" and tensor.data_ptr() % tensor.element_size():
            n = tensor.element_size()
            return (
                f"a tensor starts at an address that is not a multiple of its {n}-byte elements: give a clone"
            )
    device = tensors[0].device if tensors else torch.device("cuda")
    if device.type == "cpu" and interpreting():
        return _interpreter_reason(tensors)
    if device.type != "cuda":
        return f"the tensor is on {device}, not on a CUDA device"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA (ROCm devices are not supported)"
    if not tensors and not torch.cuda.is_available():
        return "there is no CUDA device"
    return _device_reason(device.index if device.index is not None else torch.cuda.current_device())


def stream(device: torch.device) -> int | None:
    """The current stream of a CUDA device, by its address; None: it is another device."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    current: int = torch._C._cuda_getCurrentRawStream(index)
    return current


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to the tensor's device, whichever device is current; the stream is that device's own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
