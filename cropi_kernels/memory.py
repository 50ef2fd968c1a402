"""Out of device memory, said so that the caller knows what was too large and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# How errors that are not torch's OutOfMemoryError say it: torch's CPU allocator, C++, cuBLAS, the CUDA driver (Triton).
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED", "out of memory")


class OutOfMemory(torch.OutOfMemoryError):
    """A `torch.OutOfMemoryError` that names the call, its sizes and the remedy; torch's own words follow."""


def explain(what: str, error: BaseException, remedy: str, args: Iterable[Any] = ()) -> OutOfMemory:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    sizes = ", ".join(
        f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} ({size(t.numel() * t.element_size())})"
        for t in tensors
    )
    where = f" on {tensors[0].device}, given {sizes}" if tensors else ""
    return OutOfMemory(f"{what} ran out of memory{where}: {remedy}. ({str(error).strip()})")


@contextmanager
def explained(what: str, remedy: str, *args: Any) -> Iterator[None]:
    """As `explain`, around a block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise explain(what, error, remedy, args) from error


def size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, the host among them, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
