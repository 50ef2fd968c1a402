"""Triton kernels behind `swiglu` and `swiglu_backward`: every operand read once, every result written once.

The forward walks over the columns as `fold_kernel` does, and adds what it has just computed to the folded copy: the
fold of down_proj's inputs costs no read of its own, and has the bits that `fold_inputs` would give.
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
from ..sketch_linear.triton import FOLD_TOKENS

BACKWARD_COLUMNS = 1024
PLAIN_COLUMNS = 64  # of a step, where nothing is folded
MOST_REGISTERS = 64  # said, or ptxas takes 40 for compute capability 10 and spills two of them


@triton.jit
def _sigmoids(z):
    """sigmoid(z) and sigmoid(-z): neither overflows, and neither comes from a difference."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit(do_not_specialize=["n_tokens"])
def swiglu_kernel(
    gate,  # [tokens, cols], rows stride_gate apart; up likewise
    up,
    h,  # [tokens, cols], contiguous
    folded,  # [tokens, width], contiguous
    sign,  # int8 [cols]
    offset,  # int32 [ceil(cols / width)]
    cols,
    width,
    stride_gate,
    stride_up,
    n_tokens,
    FOLDED: tl.constexpr,  # False: nothing is read or written through the last three pointers
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    col_parts = tl.cdiv(width, BW)
    t = (pid // col_parts) * BT + tl.arange(0, BT)
    j = (pid % col_parts).to(tl.int32) * BW + tl.arange(0, BW)
    gates, ups, out = gate + t[:, None] * stride_gate, up + t[:, None] * stride_up, h + t[:, None] * cols
    inside = t[:, None] < n_tokens
    total = tl.zeros((BT, BW), tl.float32)
    for b in tl.range(0, tl.cdiv(cols, width), loop_unroll_factor=2):  # several loads in flight
        if FOLDED:
            c = b * width + (j ^ tl.load(offset + b))
        else:
            c = b * width + j
        c = tl.max_contiguous(tl.multiple_of(c, 8), 8)
        valid = (j < width) & (c < cols)
        mask = inside & valid[None, :]
        z = tl.load(gates + c[None, :], mask=mask, other=0.0).to(tl.float32)
        u = tl.load(ups + c[None, :], mask=mask, other=0.0).to(tl.float32)
        product = (z * _sigmoids(z)[0] * u).to(h.dtype.element_ty)
        tl.store(out + c[None, :], product, mask=mask)
        if FOLDED:
            s = tl.load(sign + c, mask=valid, other=0).to(tl.float32)
            total += product.to(tl.float32) * s[None, :]
    if FOLDED:
        to = folded + t[:, None] * width + j[None, :]
        tl.store(to, total.to(folded.dtype.element_ty), mask=inside & (j < width)[None, :])


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
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(cols, BC)
    t = pid // parts
    c = (pid % parts) * BC + tl.arange(0, BC)
    mask = c < cols
    d = tl.load(dh + t * stride_dh + c, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + t * stride_gate + c, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + t * stride_up + c, mask=mask, other=0.0).to(tl.float32)
    s, rest = _sigmoids(z)
    tl.store(dgate + t * cols + c, (d * u * (s * (1.0 + z * rest))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + t * cols + c, (d * (z * s)).to(dup.dtype.element_ty), mask=mask)


@functools.cache
def forward_launch(block: int, folded: bool) -> Launch:
    return Launch(swiglu_kernel, FOLDED=folded, BT=FOLD_TOKENS, BW=block, num_warps=4, maxnreg=MOST_REGISTERS)


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
    width, tables = PLAIN_COLUMNS, (h, h, h)
    if plan is not None and folded is not None:
        width, of_plan = plan.folded_cols, matrix_tables(plan, gate.device)
        tables = folded, of_plan.col_sign, of_plan.col_fold
    block = min(128, max(16, _triton.next_power_of_two(width)))
    grid = (_triton.ceil_div(n_tokens, FOLD_TOKENS) * _triton.ceil_div(width, block),)
    pointers = gate, up, h, *tables
    forward_launch(block, plan is not None)(grid, pointers, (cols, width, *strides), (n_tokens,))


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
    block = min(BACKWARD_COLUMNS, max(16, _triton.next_power_of_two(cols)))
    grid = (n_tokens * _triton.ceil_div(cols, block),)
    backward_launch(block)(grid, (dh, gate, up, dgate, dup), (cols, *strides))
