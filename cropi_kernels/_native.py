"""The compiled module ``_C``: loading it, and passing tensors to it as addresses.

``_C`` knows no torch: it takes addresses and sizes and checks nothing. Every call goes through the op folders, which
check device, dtype, shape and contiguity first.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .plan import MatrixPlan, VectorPlan

PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_C: ModuleType | None
try:
    _C = importlib.import_module("cropi_kernels._C")
    IMPORT_ERROR: str | None = None
except ImportError as error:  # a source checkout that was not built, or a wheel for another platform
    _C, IMPORT_ERROR = None, str(error)


ISA = "CROPI_KERNELS_ISA"
LEVELS = {"baseline": 1, "avx2": 3, "avx512": 4}


def apply_isa(named: str | None, module: Any) -> None:
    """Use the kernels of an instruction set that the environment names, for tests of what other processors would run.

    Raises:
        ImportError: an unknown name, or one that this processor or this build does not have.
    """
    if not named:
        return
    if named not in LEVELS:
        raise ImportError(f"{ISA}={named!r}: give one of {', '.join(LEVELS)}")
    if LEVELS[named] > module.detected_level():
        raise ImportError(f"{ISA}={named!r}: this processor, or the build of cropi_kernels, does not have it")
    module.set_level(LEVELS[named])


if _C is not None:
    apply_isa(os.environ.get(ISA), _C)


def native() -> Any:
    """The compiled module, or an ImportError that says how to get it."""
    if _C is None:
        raise ImportError(
            f"the compiled kernels are missing ({IMPORT_ERROR}): build them with `pip install .`"
        )
    return _C


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the CPU kernels cannot serve these tensors, or None."""
    if _C is None:
        return f"cropi_kernels._C is not built ({IMPORT_ERROR})"
    for tensor in tensors:
        if (reason := not_plain(tensor)) is not None:
            return reason
        if tensor.device.type != "cpu":
            return f"the tensor is on {tensor.device}, not on the CPU"
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} is not one of float32, bfloat16, float16"
    return None


def not_plain(x: torch.Tensor) -> str | None:
    """Why ``x`` has no one piece of memory of its own numbers (a DTensor, a nested or sparse tensor), or None."""
    if type(x) in PLAIN and x.layout is torch.strided and not x.is_nested:
        return None
    if x.is_nested:
        return "the tensor is nested: give a dense one (torch.cat(x.unbind()), or x.to_padded_tensor(0.0))"
    if x.layout is not torch.strided:
        return f"the tensor has the layout {x.layout}: give a dense tensor"
    # As a variable: mypy takes the check for one that is never true.
    wrapper: bool = is_traceable_wrapper_subclass(x)
    if wrapper:
        of, give = type(x).__name__, "of a DTensor: full_tensor() or to_local()"
        return f"the tensor is of type {of}: give a plain tensor ({'its clone()' if pending(x) else give})"
    return None


def pending(x: torch.Tensor) -> bool:
    """Whether a collective of PyTorch's still fills ``x``, as what `DTensor.to_local()` gives: its operators wait."""
    return type(x).__name__ == "AsyncCollectiveTensor"


def misaligned(x: torch.Tensor) -> bool:
    """Whether the numbers of ``x`` begin between two elements, as a buffer that is read from an odd byte on does."""
    return type(x) in PLAIN and x.layout is torch.strided and x.data_ptr() % x.element_size() != 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where no kernel may read it: some processors cannot, and in C++ it is undefined on all.

    Nor may it read numbers that are stored without their sign (a view as ``z.conj().imag``): operators are given a copy
    of those by PyTorch, functions that call a kernel directly by this one.
    """
    if type(x) in PLAIN and x.is_neg():
        return x.resolve_neg()
    return x.clone() if misaligned(x) else x


def pointer(x: torch.Tensor) -> int:
    """The address of ``x``'s numbers: the one place where a CPU kernel gets it.

    Raises:
        ValueError: they have none, or one between two elements; the kernel would read what lies elsewhere.
    """
    if not (type(x) in PLAIN and x.layout is torch.strided and x.is_cpu):
        if (reason := not_plain(x)) is not None or not x.is_cpu:
            raise ValueError(
                f"a CPU kernel was given other memory: {reason or f'the tensor is on {x.device}'}"
            )
    address = x.data_ptr()
    if address % x.element_size():
        raise ValueError(
            f"a CPU kernel was given {x.dtype} at an address that is not a multiple of {x.element_size()}: give a clone"
        )
    return address


def matrix(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """(address, rows, cols, row stride, dtype code) of a 2-D tensor with contiguous columns."""
    return pointer(x), x.shape[0], x.shape[1], x.stride(0), DTYPES[x.dtype]


def rows_view(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., n] as [rows, n] with contiguous columns; copies only where the strides leave no other way."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 and flat.is_contiguous() else flat.contiguous()


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


# Cached: asking numpy for eight addresses took 50 us a layer between large products.
@functools.lru_cache(maxsize=16384)
def slab_plan(plan: MatrixPlan, with_row_sign: bool) -> tuple[int, ...]:
    """The plan as the kernels take it; signs of a folded side were applied by the fold. Valid while ``plan`` lives."""
    row_sign = plan.row_sign if with_row_sign and plan.row_fold is None else None
    col_sign = plan.col_sign if plan.col_fold is None else None
    return (
        plan.folded_rows,
        plan.folded_cols,
        plan.slab_rows,
        plan.slab_cols,
        plan.n_row_blocks,
        plan.n_col_blocks,
        address(row_sign),
        address(col_sign),
        address(plan.pair_row),
        address(plan.pair_col),
        address(plan.pair_slab),
        address(plan.pair_sign),
    )


@functools.lru_cache(maxsize=16384)
def column_fold(plan: MatrixPlan) -> tuple[int, int]:
    """Addresses of the offsets and signs of a fold of the inputs. Valid while ``plan`` lives."""
    return address(plan.col_fold), address(plan.col_sign)


@functools.lru_cache(maxsize=16384)
def vector_plan(plan: VectorPlan) -> tuple[int, int, int]:
    """The address of a vector's blocks, their size, and the address of its signs. Valid while ``plan`` lives."""
    return address(plan.blocks), plan.block, address(plan.sign)


def threads() -> int:
    return torch.get_num_threads()
