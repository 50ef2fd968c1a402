"""Out of device memory, said so that the caller knows what was too large and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# torch 2.4 has it under torch.cuda only.
OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class OutOfMemory(OUT_OF_MEMORY):  # type: ignore[misc,valid-type]
    """A `torch.OutOfMemoryError` that names the call, its sizes and the remedy; torch's own words follow."""


def explain(what: str, error: BaseException, remedy: str, args: Iterable[Any] = ()) -> OutOfMemory:
    """``error`` in words; one that was explained further down comes back as it is."""
    if isinstance(error, OutOfMemory):
        return error
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    sizes = ", ".join(
        f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} ({_size(t.numel() * t.element_size())})"
        for t in tensors
    )
    device = f" on {tensors[0].device}" if tensors else ""
    return OutOfMemory(
        f"{what} ran out of memory{device}{' with operands ' + sizes if sizes else ''}: {remedy}. "
        f"The allocator says: {str(error).strip()}"
    )


@contextmanager
def explained(what: str, remedy: str, *args: Any) -> Iterator[None]:
    """As `explain`, around a block."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        raise explain(what, error, remedy, args) from error


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:.1f} MiB"
