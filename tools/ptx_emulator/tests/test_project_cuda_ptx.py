"""The CUDA kernels of `project` as nvcc compiles them, launched by the library's own host code, run by the PTX machine.

tests/kernels/test_project_cuda.py runs the same source on the host: here it is the PTX, with the races and accesses
outside of the operands that the host cannot show.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_emulator.machine import launch
from ptx_emulator.memory import GlobalMemory
from ptx_emulator.text import parse
from support import nvcc

from cropi_kernels import ProjectionSpec, _cuda, project, project_transpose
from cropi_kernels.ops.project import cuda
from cropi_kernels.testing import PROJECTION_CASES, projection_magnitudes, sum_error_bound

HERE = Path(__file__).resolve().parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc.NVCC is None, reason="nvcc is not installed (PATH)")]

OBSERVER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, str]]:
    """The library, its launches going nowhere yet, and the module of every kernel."""
    path, modules = nvcc.linked(tmp_path_factory, HERE.parent / "runtime.cpp", 90)
    kernels = {name: text for text in modules for name in re.findall(r"\.entry (\w+)", text)}
    return _cuda.load(path), kernels


@pytest.fixture
def on_emulator(
    compiled: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> Iterator[Callable[..., None]]:
    """Runs `project.cuda`'s functions with the operands given, every launch on the PTX machine."""
    library, kernels = compiled
    tensors: list[torch.Tensor] = []
    failures: list[BaseException] = []
    empty = torch.empty

    def known(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensors.append(empty(*args, **kwargs))
        return tensors[-1]

    def observe(name: bytes, grid: Any, block: Any, arguments: Any) -> None:
        try:
            program = parse(kernels[name.decode()], name.decode())
            ((parameter, size),) = program.parameters.items()
            given = {parameter: ctypes.string_at(arguments[0], size)}
            launch(program, tuple(grid[:3]), block[0], given, GlobalMemory(tensors))
        except BaseException as error:  # C cannot pass it on
            failures.append(error)

    callback = OBSERVER(observe)
    monkeypatch.setattr(torch, "empty", known)
    monkeypatch.setattr(_cuda, "kernels", lambda: library)
    library.observe_launches(callback)

    def run(function: Callable[..., None], *args: Any) -> None:
        tensors.extend(t for t in args if isinstance(t, torch.Tensor))
        function(*args)
        if failures:
            raise failures[0]

    yield run
    library.observe_launches(OBSERVER())


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {name: (*case, DTYPES[i % 3]) for i, (name, case) in enumerate(PROJECTION_CASES.items())}
CASES |= {  # the loads of every dtype: 16 bytes where the offset allows it, single ones else
    f"{dtype} {'16-byte' if width else 'single'} loads, keep={keep}": (
        ProjectionSpec(512, keep=keep),
        1536,
        offset,
        dtype,
    )
    for dtype in DTYPES
    for width, offset in ((16, 2**31 + 256), (0, 2**31 + 257))
    for keep in (1.0, 0.3)
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_kernel_is_the_cpu_kernel(case: str, on_emulator: Callable[..., None]) -> None:
    spec, n, offset, dtype = CASES[case]
    x = torch.randn(2 if n < 100_000 else 1, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros(x.shape[0], spec.dim)
    on_emulator(cuda.project, x, spec, out, offset)
    size = projection_magnitudes(x, spec, offset)
    terms = 2 * (n if not spec.sparse else n * spec.nnz // spec.dim + 200) + 20
    error = (out.double() - project(x.float(), spec, offset).double()).abs()
    assert (error <= 2 * sum_error_bound(size, terms) + 1e-30).all()


@pytest.mark.parametrize("case", PROJECTION_CASES)
def test_compiled_adjoint_is_the_cpu_adjoint(case: str, on_emulator: Callable[..., None]) -> None:
    spec, n, offset = PROJECTION_CASES[case]
    n = min(n, 3000)
    y = torch.randn(3, spec.dim, generator=torch.Generator().manual_seed(0))
    got = torch.full((3, n), torch.nan)
    on_emulator(cuda.transpose, y, spec, got, offset)
    want = project_transpose(y, spec, n, offset)
    size = y.double().abs().sum(1, keepdim=True) * spec.scale * (6 if spec.kind == "gaussian" else 1)
    assert ((got - want).abs() <= 2 * sum_error_bound(size, spec.dim + 16)).all()
