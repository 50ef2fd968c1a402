"""Triton kernels on CPU tensors, in one of two ways. A process can have but one, so test_gpu_kernels.py starts one
for each:

- `TRITON_INTERPRET=1`: Triton's interpreter, in float32 and float16 (of bfloat16 it makes garbage; the ops refuse it):
  for what the emulator lacks, and for a look into a kernel;
- `KERNELS_FOR=80` or `90`: compiled as for such a GPU, and the PTX run by tools/ptx_emulator. Bfloat16 too; memory
  outside of the operands, races in shared memory and copies that are read too early are errors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from cropi_kernels import _gpu, _triton

CAPABILITY = int(os.environ.get("KERNELS_FOR", "0"))
SHARED = {80: 166_912, 90: 232_448}  # bytes of a block
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (INTERPRETER or CAPABILITY):
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore_glob = (
        ["test_launches.py", "test_logprob_tiles.py"]
        if CAPABILITY
        else ["test_emulated_gpu.py", "test_gpu_suite.py", "test_host_cost.py", "test_whole_model.py"]
    )


@pytest.fixture(autouse=True)
def scalar_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of one bit, also where a comparison of two numbers is a part of them.

    In Triton 3.9's interpreter a comparison has the type of what it compares; one of two numbers, spread over a block,
    is then int32, and that release's loads and stores refuse such a mask. The compiler is right.
    """
    if not INTERPRETER:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    spread = InterpreterBuilder.create_splat

    def create_splat(self: InterpreterBuilder, ret_ty: object, arg: TensorHandle) -> TensorHandle:
        held = TensorHandle(arg.data, tl.int1) if arg.data.dtype == bool else arg
        return spread(self, ret_ty, held)

    monkeypatch.setattr(InterpreterBuilder, "create_splat", create_splat)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``dtype``: all that the kernels take. ``half``: those of 16 bits, of which sm_80 has one kind of tile."""
    half = {0: [torch.float16], 80: [torch.bfloat16], 90: [torch.float16, torch.bfloat16]}[CAPABILITY]
    for name, dtypes in (("dtype", [torch.float32, *half]), ("half", half)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, dtypes, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned: None) -> None:
    """A GPU's fresh memory is anything."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if CAPABILITY:
            from ptx_emulator.launch import emulated_gpu

            from cropi_kernels import _launch
            from cropi_kernels.ops.linear_logprob import triton_tiles

            monkeypatch.setattr(_gpu, "interpreting", lambda: True)
            # The emulator's memory are the tensors of a launch: an address alone would say nothing of where they end.
            monkeypatch.setattr(_launch, "BY_ADDRESS", False)
            monkeypatch.setattr(_triton, "shared_memory", lambda device: SHARED[CAPABILITY])
            # It has no copy engine.
            monkeypatch.setattr(triton_tiles, "serves", lambda *args: False)
            stack.enter_context(emulated_gpu(CAPABILITY))
        yield
