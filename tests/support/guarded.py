"""Memory between two pages that nobody may touch: a kernel that reads or writes a byte too many ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Room for one tensor; `place` puts it at the end, or at the beginning."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        whole = torch.frombuffer(mmap.mmap(-1, self.size + 2 * PAGE), dtype=torch.uint8)
        for page in (whole.data_ptr(), whole.data_ptr() + PAGE + self.size):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._inside = whole[PAGE : PAGE + self.size]

    def place(self, x: torch.Tensor, at_end: bool = True) -> torch.Tensor:
        """``x`` with the same strides, its last (first) byte the last (first) that may be touched."""
        if x.numel() == 0:
            return x
        size = (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1) * x.element_size()
        if size > self.size:
            raise ValueError(f"{size} bytes do not fit into an arena of {self.size}")
        raw = self._inside[self.size - size :] if at_end else self._inside[:size]
        moved = raw.view(x.dtype).as_strided(x.shape, x.stride())
        one = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
        moved[one].copy_(x[one])  # torch does not write through a stride of 0
        return moved
