"""Which kernels a processor gets, from its CPUID words, and that operands may lie at any address."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.op_calls import OFFSETS, OPS, PLAN, A, D
from support.tensors import normal

from cropi_kernels import (
    CsrRows,
    GradientSketcher,
    ProjectionSpec,
    _native,
    logprob_and_grad,
    project,
    project_csr,
    project_transpose,
    sketch_linear,
)

# Bits of CPUID 1:ecx, 7:ebx, 0x80000001:ecx, and of XCR0 (SDM volume 2, table 3-8; volume 1, section 13.3).
AVX2_LEVEL = {
    "fma": (0, 12), "movbe": (0, 22), "osxsave": (0, 27), "avx": (0, 28), "f16c": (0, 29),
    "bmi1": (1, 3), "avx2": (1, 5), "bmi2": (1, 8), "abm": (2, 5), "xmm state": (3, 1), "ymm state": (3, 2),
}  # fmt: skip
AVX512_LEVEL = {
    "avx512f": (1, 16), "avx512dq": (1, 17), "avx512cd": (1, 28), "avx512bw": (1, 30), "avx512vl": (1, 31),
    "opmask state": (3, 5), "zmm0-15 state": (3, 6), "zmm16-31 state": (3, 7),
}  # fmt: skip


def level_without(*missing: str) -> int:
    words = [0, 0, 0, 0]
    for name, (word, bit) in (AVX2_LEVEL | AVX512_LEVEL).items():
        if name not in missing:
            words[word] |= 1 << bit
    return int(_native.native().level_of(*words))


def test_every_feature_is_asked_for() -> None:
    """A processor, or a virtual machine that hides a part of one: nothing may be taken for granted."""
    assert level_without() == 4
    assert {name: level_without(name) for name in AVX2_LEVEL} == dict.fromkeys(AVX2_LEVEL, 1)
    assert {name: level_without(name) for name in AVX512_LEVEL} == dict.fromkeys(AVX512_LEVEL, 3)
    assert level_without(*AVX2_LEVEL, *AVX512_LEVEL) == 1


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")
def test_this_processor_is_seen_as_the_system_sees_it() -> None:
    kernels = _native.native()
    words = kernels.cpu_words()
    assert kernels.detected_level() == kernels.level_of(*words)
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return
    flags = next(
        line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("flags")
    ).split()
    for name, (word, bit) in (AVX2_LEVEL | AVX512_LEVEL).items():
        if "state" not in name and name != "osxsave":  # the flag osxsave is hidden from some systems' lists
            assert (name in flags) == bool(words[word] >> bit & 1), name


# ---------------------------------------------------------------------------------------------- any address
def displaced(x: torch.Tensor) -> torch.Tensor:
    """``x`` in a buffer whose numbers begin at an odd byte, as what is read from a file may lie."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    assert moved.data_ptr() % x.element_size()
    return moved.copy_(x)


SPEC = ProjectionSpec(64, kind="sjlt", nnz=2)
CSR = CsrRows(torch.tensor([0, 2, 3]), torch.tensor([5, 70, 5]), torch.tensor([1.0, 2.0, 3.0]), 100)
HEAD, TARGETS = normal(60, 40, seed=4), torch.arange(9)
CALLS: dict[str, tuple[list[torch.Tensor], Callable[..., Any]]] = {
    "project": ([A], lambda x: project(x, SPEC)),
    "project, float64": ([A.double()], lambda x: project(x, SPEC, backend="cpu")),
    "project, out": ([A], lambda x: project(x, SPEC, out=torch.zeros(9, 64))),
    "project_transpose": ([normal(3, 64)], lambda y: project_transpose(y, SPEC, 50)),
    "project_csr": ([*CSR[:3]], lambda *x: project_csr(CsrRows(*x, 100), SPEC)),
    "logprob_and_grad": (
        [A, HEAD, TARGETS, normal(60), normal(9)],
        lambda h, w, t, bias, by: logprob_and_grad(h, w, t, lambda p, a, b: by[a:b], bias=bias)[1],
    ),
    "offsets": ([D, A, OFFSETS], lambda d, a, o: sketch_linear(d, a, o, PLAN, torch.zeros(3, 32768))),
} | {
    op: (list(call.operands.values()), lambda *x, call=call: call(**dict(zip(call.operands, x))))  # type: ignore[misc]
    for op, call in OPS.items()
}


@pytest.mark.parametrize("name", CALLS)
def test_operands_may_begin_at_any_byte(name: str) -> None:
    """Each is copied, alone and with the others; what is written must be where kernels can write."""
    operands, run = CALLS[name]
    first = lambda result: result[0] if isinstance(result, tuple) else result  # noqa: E731
    want = first(run(*operands))
    out = [i for i, key in enumerate(OPS[name].operands) if key == "out"] if name in OPS else []
    for i in range(len(operands)):
        moved = [displaced(x) if i == k else x for k, x in enumerate(operands)]
        if i in out:
            with pytest.raises(
                ValueError, match=r"out is torch.float32 and begins at .* not a multiple of 4: give fresh"
            ):
                run(*moved)
        else:
            assert torch.equal(first(run(*moved)), want), i


def test_a_projection_is_not_added_to_an_odd_address() -> None:
    with pytest.raises(
        ValueError, match="out is torch.float32 and begins at an address that is not a multiple of 4"
    ):
        project(A, SPEC, out=displaced(torch.zeros(9, 64)))


def test_activations_at_any_byte_are_sketched() -> None:
    """The taps hand addresses straight to the kernels: they look as well."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return displaced(x)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return displaced(dy)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = torch.nn.LayerNorm(20), torch.nn.Linear(20, 30)
            self.odd = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            move = Odd.apply if self.odd else torch.Tensor.clone
            return move(self.up(move(self.norm(move(x)))))

    torch.manual_seed(0)
    model, x, sketches = Model(), normal(2, 7, 20).requires_grad_(), []
    for odd in (False, True):
        model.odd = odd
        with (
            GradientSketcher(model, verify=False) as sketcher,
            sketcher.batch(torch.arange(2), shape=(2, 7)) as got,
        ):
            model(x).square().sum().backward()
        sketches.append(got.sketches)
    assert torch.equal(*sketches) and sketches[0].any()
