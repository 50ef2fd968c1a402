"""Launches of Triton kernels, at as little cost to the host as they can have.

Triton looks at every argument of every launch to find out which of its compiled kernels serves it: 8 to 15 us, hundreds
of times a pass. A `Launch` asks Triton once for each set of dtypes. After that, arguments of the usual kind (addresses
and sizes that are multiples of 16, integers of 32 bits) go straight to what was compiled for the first of them.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
from triton import knobs
from triton.runtime import driver

from . import _gpu
from ._triton import release

T = TypeVar("T")
VARIABLE = "CROPI_KERNELS_LAUNCHES"  # "triton": every launch goes Triton's own way
MEMBERS = 3  # operands of a kind that one launch takes, at most: q, k and v
# The releases whose compiled kernels are known to take their arguments as they are handed over below.
STRAIGHT = (3, 6) <= release(triton.__version__)[:2] <= (3, 7) and os.environ.get(VARIABLE) != "triton"
# Every launch asks for products and sums in one rounding, as releases before 3.10 do by themselves: the bits must not
# depend on the release.
OPTIONS = {"enable_fp_fusion": True}
# False: by tensors, for what runs compiled kernels where there is no GPU, and must know where an operand ends.
BY_ADDRESS = True


# By map, they cost no call of a function in Python.
_address, _dtype = torch.Tensor.data_ptr, operator.attrgetter("dtype")


def padded(operands: list[T]) -> list[T]:
    """``operands`` and the last of them again, as many as a kernel has parameters for."""
    return operands + operands[-1:] * (MEMBERS - len(operands))


class Launch:
    """One kernel with its constants, on any device and for any dtypes.

    Args:
        kernel: its parameters are pointers, integers that are worth a kernel of their own where they are multiples of
            16 (sizes and strides that addresses are made of), integers that are not (``do_not_specialize``), floats,
            and constants, in this order.
        constants: the values of its constants, and ``num_warps`` and ``num_stages``.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self._values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[Any, ...] | None, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        pointers: Sequence[torch.Tensor],
        sizes: Sequence[int] = (),
        counts: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:
        """Launch on the device of the first tensor, on its current stream."""
        device = pointers[0].device.index
        addresses = [*map(_address, pointers)]
        key = (device, *map(_dtype, pointers)) if usual(addresses, sizes, counts) else None
        compiled = self._compiled.get(key)
        current = device is None or torch._C._cuda_getDevice() == device
        if compiled is not None and current and not _hooked():
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.active.get_current_stream(device)
            compiled.run(
                x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *(addresses if BY_ADDRESS else pointers), *sizes, *counts, *floats, *self._values,
            )  # fmt: skip
            return
        with _gpu.on(pointers[0]):
            compiled = self.kernel[grid](*pointers, *sizes, *counts, *floats, **self.constants, **OPTIONS)
        if key is not None and STRAIGHT and compiled is not None:
            self._compiled[key] = compiled


def usual(addresses: Sequence[int], sizes: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether Triton would take the same kernel for these as for all others of which this is true."""
    low = wide = 0
    for n in addresses:
        low |= n
    for n in sizes:
        wide |= n
    low |= wide
    for n in counts:
        wide |= n if n >= 0 else ~n  # the bits that a signed number needs
    return low & 15 == 0 and wide < 1 << 31


def _hooked() -> bool:
    """Whether somebody (a profiler) wants to be told of launches, as Triton tells of them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
