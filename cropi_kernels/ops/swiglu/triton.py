"""Triton kernels behind `swiglu` and `swiglu_backward`: every operand read once, every result written once.

The forward adds what it has just computed to the folded copy: the fold of down_proj's inputs costs no read of its own.
It adds a fold's blocks in another order than `fold_inputs`, and may differ from it by the rounding of float32 sums.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ... import _native, _triton
from ..._launch import Launch
from ...plan import MatrixPlan
from .._device_plan import matrix_tables

# Of a step. Measured on an H100, 16384 x 8960: the forward takes 288 us (512 columns 285, 2048 289), with a fold 304
# (2048 columns 321); pieces of 64 columns, as `fold_kernel` has them, took 366 and 455.
COLUMNS = 1024


def columns(cols: int) -> int:
    """Of a program where nothing is folded."""
    return min(COLUMNS, max(16, _triton.next_power_of_two(cols)))


@triton.jit
def _sigmoids(z):
    """sigmoid(z) and sigmoid(-z): neither overflows, and neither comes from a difference."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def _columns(cols, BC: tl.constexpr):
    """(token, its columns) of a program that has a piece of one row."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(cols, BC)
    return pid // parts, (pid % parts) * BC + tl.arange(0, BC)


@triton.jit
def _product(gates, ups, mask):
    """silu(gate) * up in float32, at pointers."""
    z = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(ups, mask=mask, other=0.0).to(tl.float32)
    return z * _sigmoids(z)[0] * u


@triton.jit
def swiglu_kernel(
    gate,  # [tokens, cols], rows stride_gate apart; up likewise
    up,
    h,  # [tokens, cols], contiguous
    cols,
    stride_gate,
    stride_up,
    BC: tl.constexpr,
):
    t, c = _columns(cols, BC)
    mask = c < cols
    product = _product(gate + t * stride_gate + c, up + t * stride_up + c, mask)
    tl.store(h + t * cols + c, product.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def swiglu_fold_kernel(
    gate,  # [tokens, cols], rows stride_gate apart; up likewise
    up,
    h,  # [tokens, cols], contiguous
    folded,  # [tokens, width], contiguous
    sign,  # int8 [cols]
    offset,  # int32 [blocks]
    cols,
    width,
    stride_gate,
    stride_up,
    blocks,  # ceil(cols / width)
    NB: tl.constexpr,
    BW: tl.constexpr,
):
    """A token a program, NB blocks of the fold at a time: the rows are read and written in long pieces."""
    t = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, NB * BW)
    j = q % BW
    total = tl.zeros((NB * BW,), tl.float32)
    for first in range(0, blocks, NB):
        b = first + q // BW
        c = b * width + (j ^ tl.load(offset + b, mask=b < blocks, other=0))
        c = tl.max_contiguous(tl.multiple_of(c, 8), 8)
        mask = (b < blocks) & (j < width) & (c < cols)
        product = _product(gate + t * stride_gate + c, up + t * stride_up + c, mask).to(h.dtype.element_ty)
        tl.store(h + t * cols + c, product, mask=mask)
        total += product.to(tl.float32) * tl.load(sign + c, mask=mask, other=0).to(tl.float32)
    sums = tl.sum(tl.reshape(total, (NB, BW)), 0)
    to = tl.arange(0, BW)
    tl.store(folded + t * width + to, sums.to(folded.dtype.element_ty), mask=to < width)


@triton.jit
def swiglu_backward_kernel(
    dh,  # [tokens, cols], rows stride_dh apart; gate and up likewise
    gate,
    up,
    dgate,  # [tokens, cols], contiguous, as is dup
    dup,
    cols,
    stride_dh,
    stride_gate,
    stride_up,
    BC: tl.constexpr,
):
    t, c = _columns(cols, BC)
    mask = c < cols
    d = tl.load(dh + t * stride_dh + c, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + t * stride_gate + c, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + t * stride_up + c, mask=mask, other=0.0).to(tl.float32)
    s, rest = _sigmoids(z)
    tl.store(dgate + t * cols + c, (d * u * (s * (1.0 + z * rest))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + t * cols + c, (d * (z * s)).to(dup.dtype.element_ty), mask=mask)


@functools.cache
def forward_launch(block: int) -> Launch:
    return Launch(swiglu_kernel, BC=block, num_warps=4)


@functools.cache
def fold_launch(width: int) -> Launch:
    block = max(16, _triton.next_power_of_two(width))
    return Launch(swiglu_fold_kernel, NB=max(1, COLUMNS // block), BW=block, num_warps=4)


@functools.cache
def backward_launch(block: int) -> Launch:
    return Launch(swiglu_backward_kernel, BC=block, num_warps=4)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, plan: MatrixPlan | None, h: torch.Tensor, folded: torch.Tensor
) -> None:
    """Fills ``h``, and with a plan ``folded``."""
    gate, up = _native.rows_view(gate), _native.rows_view(up)
    forward(gate, up, plan, h, folded, gate.shape[0], (gate.stride(0), up.stride(0)))


def forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    plan: MatrixPlan | None,
    h: torch.Tensor,
    folded: torch.Tensor | None,
    n_tokens: int,
    strides: tuple[int, int],
) -> None:
    """`swiglu` of tensors with any number of axes, whose rows lie ``strides`` apart; ``folded`` with a plan only."""
    cols = gate.shape[-1]
    if n_tokens == 0 or cols == 0:
        return
    if plan is None or folded is None:
        block = columns(cols)
        grid = (n_tokens * _triton.ceil_div(cols, block),)
        forward_launch(block)(grid, (gate, up, h), (cols, *strides))
        return
    width, tables = plan.folded_cols, matrix_tables(plan, gate.device)
    pointers = gate, up, h, folded, tables.col_sign, tables.col_fold
    blocks = _triton.ceil_div(cols, width)
    fold_launch(width)((n_tokens,), pointers, (cols, width, *strides), (blocks,))


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor
) -> None:
    """Fills ``dgate`` and ``dup``."""
    dh, gate, up = _native.rows_view(dh), _native.rows_view(gate), _native.rows_view(up)
    backward(dh, gate, up, dgate, dup, dh.shape[0], (dh.stride(0), gate.stride(0), up.stride(0)))


def backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    n_tokens: int,
    strides: tuple[int, int, int],
) -> None:
    """`swiglu_backward` of tensors with any number of axes, whose rows lie ``strides`` apart."""
    cols = gate.shape[-1]
    if n_tokens == 0 or cols == 0:
        return
    block = columns(cols)
    grid = (n_tokens * _triton.ceil_div(cols, block),)
    backward_launch(block)(grid, (dh, gate, up, dgate, dup), (cols, *strides))
