"""Whether Triton can serve a call.

Nothing here imports Triton until a call is about to use it: importing the package stays cheap on a laptop.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re

import torch

from . import _gpu

KNOBS = (3, 4)  # the first release that has what launches import
FENCED = (3, 7, 1)  # the first release whose products wait for the copies' writes
# The first and the last release whose Gluon is known to compile what is written in it here.
TURNS = ((3, 6), (3, 9))
_INSTALL = "a CUDA build of torch brings it; otherwise `pip install 'triton>=3.6'` (Linux)"


@functools.cache
def import_error() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    try:
        installed = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError) as error:
        return f"triton does not import ({error})"
    if not installed:
        return f"triton is not installed: {_INSTALL}"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # nightly builds have other names, and are new
        return None
    if release(version) >= KNOBS:
        return None
    return f"triton {version} is too old for the kernels: install torch>=2.11, whose CUDA builds bring triton>=3.6"


def release(version: str) -> tuple[int, ...]:
    """``3.7.1+git12`` as (3, 7, 1)."""
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def fence_reason(capability: tuple[int, int], version: str) -> str | None:
    """Why this Triton's products may read shared memory too early on such a GPU, or None.

    Before 3.7.1, Triton put no proxy fence between asynchronous copies to shared memory and the warp-group products
    that read it. On compute capability 10 and newer, its tensor cores were seen to read what was there before.
    """
    if capability < (10, 0) or release(version) >= FENCED:
        return None
    need = ".".join(map(str, FENCED))
    return (
        f"triton {version} misses a fence that compute capability {capability[0]}.{capability[1]} needs between copies "
        f"and products, so that results may be wrong: install triton>={need} (and a torch that goes with it)"
    )


@functools.cache
def _fence_reason_of(index: int) -> str | None:
    import triton

    return fence_reason(torch.cuda.get_device_capability(index), triton.__version__)


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot serve these tensors, or None."""
    # No package serves a tensor without memory: to install Triton was no remedy for it.
    on_meta = bool(tensors) and tensors[0].is_meta
    reason = (None if on_meta else import_error()) or _gpu.unsupported(*tensors)
    if reason is not None or _gpu.interpreting():
        return reason
    device = tensors[0].device if tensors else torch.device("cuda")
    return _fence_reason_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def installed() -> tuple[int, ...]:
    """Triton's release: (3, 7), say, of 3.7.1."""
    import triton

    return release(triton.__version__)[:2]


def gluon_is_known() -> bool:
    """Gluon, the part of Triton in which warps are given different work, may change with every release."""
    return TURNS[0] <= installed() <= TURNS[1]


def takes_turns(device: torch.device) -> bool:
    """Whether kernels in Gluon serve a device: Hopper GPUs, with a Triton whose Gluon is known.

    They serve bfloat16 alone: float16 was not compared on a GPU, and there is no interpreter for Gluon. Where they do
    not serve, kernels in Triton's own language give the same bits.
    """
    return device.type == "cuda" and not _gpu.interpreting() and gluon_is_known() and is_hopper(device)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of a kernel may have; 0 where kernels are interpreted."""
    return _shared_memory_of(device.index) if device.type == "cuda" else 0


@functools.cache
def _shared_memory_of(index: int) -> int:
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def ceil_div(a: int, b: int) -> int:
    """As `triton.cdiv`, which takes the host several microseconds."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
