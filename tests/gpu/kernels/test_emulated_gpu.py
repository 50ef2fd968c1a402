"""Kernels with a mistake: what passes in Triton's interpreter must fail in the PTX emulator."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.memory import OutOfBounds


@triton.jit
def copy_kernel(x, y, n, last, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * 2, mask=i < last)


@pytest.mark.parametrize("n,last,fits", [(100, 100, True), (101, 100, False), (100, 101, False)])
def test_an_access_past_the_operands_is_found(n: int, last: int, fits: bool) -> None:
    x, y = torch.arange(100.0), torch.empty(100)
    if fits:
        copy_kernel[(2,)](x, y, n, last, BLOCK=64)
        assert torch.equal(y, 2 * x)
    else:
        with pytest.raises(OutOfBounds, match="in no tensor of the launch"):
            copy_kernel[(2,)](x, y, n, last, BLOCK=64)


@triton.jit
def add_bfloat16_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


def test_bfloat16_rounds_as_torch_does() -> None:
    x, y, out = torch.randn(256).bfloat16(), torch.randn(256).bfloat16(), torch.empty(256).bfloat16()
    add_bfloat16_kernel[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out, x + y)
