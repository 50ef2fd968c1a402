"""Checks that every op makes before a kernel sees an address.

Those of dtypes, shapes and devices also run while a graph is traced; those that read values (`check_offset_values`)
do not, and read the host's memory only.
"""

from __future__ import annotations

import torch

from .. import _native

DEVICES = ("cpu", "cuda")
FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_operand(name: str, x: torch.Tensor, cols: int, what: str) -> None:
    """``x`` must be a dense floating-point [tokens, cols]."""
    if x.ndim != 2 or x.shape[1] != cols:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [tokens, {cols}] ({what})")
    check_floating(name, x)


def check_floating(name: str, x: torch.Tensor) -> None:
    if x.dtype not in FLOATING:
        if not isinstance(x, torch.Tensor):  # an array, whose dtypes have the same names
            raise TypeError(
                f"{name} is of type {type(x).__name__}: give a torch.Tensor (torch.as_tensor({name}))"
            )
        raise ValueError(f"{name} is {x.dtype}: give float32, bfloat16 or float16 ({name}.float())")
    if x.layout != torch.strided and not x.is_nested:
        raise ValueError(f"{name} has the sparse layout {x.layout}: give a dense tensor ({name}.to_dense())")
    check_plain(name, x)


def check_plain(name: str, x: torch.Tensor) -> None:
    """``x`` must have one piece of memory of its own: no DTensor, no nested tensor, no other wrapper."""
    if (reason := _native.not_plain(x)) is not None:
        raise ValueError(f"{name}: {reason}")


def check_devices(first: str, x: torch.Tensor, **others: torch.Tensor) -> None:
    """All on the device of ``x``."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(
                f"{name} is on {other.device} but {first} is on {x.device}: move them to one device "
                f"({name}.to({str(x.device)!r}))"
            )


def check_out(out: torch.Tensor, n_segments: int, dim: int) -> None:
    """``out`` must be a contiguous float32 or float64 [n_segments, dim] accumulator."""
    if out.ndim != 2 or out.shape[0] != n_segments or out.shape[1] != dim:
        raise ValueError(
            f"out has shape {tuple(out.shape)}: it must be [segments, sketch numbers] = [{n_segments}, {dim}]"
        )
    check_accumulator(out)


def check_accumulator(out: torch.Tensor) -> None:
    check_plain("out", out)
    if out.dtype not in (torch.float32, torch.float64) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype}, contiguous={out.is_contiguous()}: give a contiguous float32 tensor"
        )
    if out.requires_grad:
        raise ValueError("out requires a gradient, which sketches do not have: give out.detach()")


def check_offsets(offsets: torch.Tensor) -> int:
    """Returns the number of segments; token range s is offsets[s] .. offsets[s + 1]."""
    check_plain("offsets", offsets)
    if (
        offsets.dtype != torch.int64
        or offsets.ndim != 1
        or offsets.numel() < 1
        or not offsets.is_contiguous()
    ):
        raise ValueError(
            f"offsets is {offsets.dtype} {tuple(offsets.shape)}: give a contiguous 1-D int64 tensor"
        )
    if offsets.device.type not in DEVICES:
        raise ValueError(
            f"offsets is on {offsets.device}: give offsets.cpu(), or the offsets on the tokens' CUDA device"
        )
    return offsets.numel() - 1


def check_offset_values(offsets: torch.Tensor, n_tokens: int) -> None:
    """On the CPU only: reading them on a device would make the host wait, and the kernels clamp them to the tokens."""
    if offsets.device.type != "cpu":
        return
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > n_tokens:
        raise ValueError(
            f"offsets run from {values[0]} to {values[-1]}, and there are {n_tokens} tokens: give 0 to {n_tokens}, "
            "or a part of it"
        )
    for s, (a, b) in enumerate(zip(values, values[1:])):
        if b < a:
            raise ValueError(
                f"offsets[{s + 1}]={b} is below offsets[{s}]={a}: segments must not run backwards"
            )


def offsets_for(backend: str, offsets: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The ``offsets`` of the rows of ``x``, where the kernels of a backend want them."""
    if backend == "triton":
        return on_device(offsets, x.device)
    if backend == "cpu" and offsets.device.type != "cpu":
        offsets = offsets.cpu()
        # A CPU kernel trusts them: those that came from a device are checked now.
        check_offset_values(offsets, x.shape[0])
    return offsets


def on_device(offsets: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``offsets`` for a GPU kernel."""
    if offsets.device == device:
        return offsets
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"offsets is on {offsets.device}, and a CUDA graph cannot record the copy: give "
            f"offsets.to({str(device)!r}), made before the capture"
        )
    return offsets.to(device)
