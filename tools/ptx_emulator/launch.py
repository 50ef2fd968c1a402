"""Triton's own launches, compiled for a GPU that is not here and run by `machine` on CPU tensors."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from ptx_emulator.machine import launch
from ptx_emulator.memory import GlobalMemory
from ptx_emulator.text import parse

# As `struct` has them.
FORMATS = {
    "i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d", "f64": "d",
}  # fmt: skip


class EmulatedDriver(DriverBase):  # type: ignore[misc]
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
    kinds = kernel.src.signature.values()
    given = [(v, k) for v, k in zip(arguments, kinds, strict=True) if k != "constexpr"]
    names = list(program.parameters)
    parameters = {n: _bytes(v, k) for n, (v, k) in zip(names, given, strict=False)}
    parameters |= {n: bytes(8) for n in names[len(given) :]}  # scratch memory that no kernel here uses
    memory = GlobalMemory([v for v, _ in given if isinstance(v, torch.Tensor)])
    launch(program, grid, kernel.metadata.num_warps * 32, parameters, memory, kernel.metadata.shared)


def only_ptx(*stage: Any) -> tuple[str, str]:
    """Triton's hook for the stages of a compilation: no ptxas, which took a tenth of the tests' time; nothing runs its
    code here, and tests/gpu/aot looks at it. Without arguments it is asked for its part of the keys of caches."""
    if stage:
        stage[1]["cubin"] = lambda source, metadata: b""
    return "only ptx", "only ptx"


@contextlib.contextmanager
def emulated_gpu(capability: int) -> Iterator[None]:
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
    driver.set_active(EmulatedDriver(capability))
    try:
        with knobs.runtime.scope(), knobs.cache.scope():
            knobs.runtime.add_stages_inspection_hook = only_ptx
            # Triton 3.6 has no part of the hook in its keys: a GPU would be given a kernel without code.
            knobs.cache.dir = str(Path(knobs.cache.dir) / "ptx")
            yield
    finally:
        CompiledKernel._init_handles = before
        driver._active = active
