"""Triton's own launches, compiled for a GPU that is not here and run by `ptx_machine` on CPU tensors."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ptx_machine import Machine
from ptx_memory import GlobalMemory
from ptx_text import parse
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

LANES = 8192  # run at once: enough to hide the interpreter, few enough to stay in the cache
FORMATS = {
    "i1": "?",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
}
FORMATS |= {"fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}


class PaperDriver(DriverBase):  # type: ignore[misc]
    """Says that there is a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # type: ignore[no-any-return]

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _bytes(value: Any, kind: str) -> bytes:
    if kind.startswith("*"):
        return struct.pack("Q", value.data_ptr() if value is not None else 0)
    return struct.pack(FORMATS[kind], value)


def execute(kernel: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
    """One launch of a compiled kernel."""
    program = parse(kernel.asm["ptx"])
    kinds = list(kernel.src.signature.values())
    given = [(v, k) for v, k in zip(arguments, kinds, strict=True) if k != "constexpr"]
    names = list(program.parameters)
    parameters = {n: _bytes(v, k) for n, (v, k) in zip(names, given, strict=False)}
    parameters |= {n: bytes(8) for n in names[len(given) :]}  # scratch memory that no kernel here uses
    memory = GlobalMemory([v for v, _ in given if isinstance(v, torch.Tensor)])
    threads = kernel.metadata.num_warps * 32
    blocks = np.array(
        [b[::-1] for b in itertools.product(*(range(n) for n in grid[::-1]))], np.int64
    ).reshape(-1, 3)
    step = max(1, LANES // threads)
    for first in range(0, len(blocks), step):
        some = blocks[first : first + step]
        with np.errstate(all="ignore"):
            Machine(program, some, grid, threads, parameters, memory, max(kernel.metadata.shared, 16)).run()


@contextlib.contextmanager
def paper_gpu(capability: int) -> Iterator[None]:
    """Inside, a launch compiles for ``capability`` as it would there, and runs here."""

    def handles(self: Any) -> None:
        def run(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: Any,
            packed: Any,
            metadata: Any,
            enter: Any,
            leave: Any,
            *arguments: Any,
        ) -> None:
            execute(self, (x, y, z), list(arguments))

        self.module, self.function, self._run = object(), None, run

    before, active = CompiledKernel._init_handles, driver._active
    CompiledKernel._init_handles = handles
    driver.set_active(PaperDriver(capability))
    try:
        yield
    finally:
        CompiledKernel._init_handles = before
        driver._active = active
