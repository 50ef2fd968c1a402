"""Triton kernels behind `rms_norm` and `rms_norm_backward`: a row in registers, every operand read once.

The backward is that of `norm_grad` with one more load (the scale of the norm) and one more store (dx): the sums that a
sketch needs cost no read of their own.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ... import _native, _triton
from ..._launch import Launch
from .._triton_segments import Chunks, chunk_of, cut, reduce_partials
from ..norm_grad.triton import CHUNK_TOKENS, load_rows, row_constants


@triton.jit(do_not_specialize=["n_tokens"])
def rms_kernel(
    x,  # [tokens, n], rows stride_x apart
    weight,  # [n]
    y,  # [tokens, n], contiguous
    scale,  # float32 [tokens]
    n,
    stride_x,
    n_tokens,
    eps,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i = tl.arange(0, BN)
    mask = (t < n_tokens)[:, None] & (i < n)[None, :]
    w = tl.load(weight + i, mask=i < n, other=0.0).to(tl.float32)
    v = tl.load(x + t[:, None] * stride_x + i[None, :], mask=mask, other=0.0).to(tl.float32)
    squares = v * v
    if BN <= 128:
        # A lane may have one square of a row, which the compiler would fuse with another lane's, rounded: each lane
        # would have its own sum, and Triton 3.9 lets all lanes write theirs to one place. A choice is not fused.
        squares = tl.where(mask, squares, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(squares, 1) / n + eps)
    out = w[None, :] * (v * r[:, None])
    tl.store(y + t[:, None] * n + i[None, :], out.to(y.dtype.element_ty), mask=mask)
    tl.store(scale + t, r, mask=t < n_tokens)


@triton.jit(do_not_specialize=["n_segments", "n_tokens"])
def rms_backward_kernel(
    dy,  # [tokens, n], rows stride_dy apart; x likewise
    x,
    weight,  # [n]
    scale,  # float32 [tokens]
    dx,  # [tokens, n], contiguous
    out,  # float32 [segments, n]
    partial,  # float32, from sums_at on [slots, n]
    table,  # of the chunks
    n,
    stride_dy,
    stride_x,
    sums_at,
    n_segments,
    n_tokens,
    SUMS: tl.constexpr,  # False: of all tokens, CHUNK at a time, and no segments
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,  # False: a chunk has one step, of BT tokens
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if SUMS:
        segment, t0, t1, slot = chunk_of(table, pid)
        used = segment < n_segments
    else:
        t0 = pid * CHUNK
        t1 = tl.minimum(t0 + CHUNK, n_tokens)
        used = t0 < t1
    if used:
        i = tl.arange(0, BN)
        inside = i < n
        w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        sums = tl.zeros((BN,), tl.float32)
        t = t0 + tl.arange(0, BT)
        live = (t < t1)[:, None] & inside[None, :]
        g_rows, v_rows = load_rows(dy, stride_dy, t, i, live), load_rows(x, stride_x, t, i, live)
        r_rows = tl.load(scale + t, mask=t < t1, other=0.0)
        for _ in range(0, tl.cdiv((t1 - t0).to(tl.int32), BT)):
            g, v, r = g_rows.to(tl.float32), v_rows.to(tl.float32), r_rows[:, None]
            if AHEAD:  # as in `norm_kernel`
                later = t + BT
                live = (later < t1)[:, None] & inside[None, :]
                g_rows, v_rows = (
                    load_rows(dy, stride_dy, later, i, live),
                    load_rows(x, stride_x, later, i, live),
                )
                r_rows = tl.load(scale + later, mask=later < t1, other=0.0)
            v = v * r
            if SUMS:
                terms = g * v
                if BN <= 128:  # a lane may have one token of a tile: as in `rms_kernel`
                    terms = tl.where((t < t1)[:, None], terms, 0.0)
                sums += tl.sum(terms, 0)
            g = g * w[None, :]
            products = g * v
            # Made again, and not kept since the row was loaded: a row of 8192 numbers leaves no register.
            mask = (t < t1)[:, None] & inside[None, :]
            if BN <= 128:  # as in `rms_kernel`
                products = tl.where(mask, products, 0.0)
            d = r * (g - v * (tl.sum(products, 1) / n)[:, None])
            tl.store(dx + t[:, None] * n + i[None, :], d.to(dx.dtype.element_ty), mask=mask)
            t += BT
        if SUMS:
            target = tl.where(slot < 0, out + segment * n, partial + sums_at + slot * n)
            tl.store(target + i, sums, mask=inside)


def forward_tile(n: int) -> tuple[int, int, int]:
    """(tokens, features, warps) of a program of `rms_kernel`."""
    features = max(16, _triton.next_power_of_two(n))
    return max(1, 4096 // features), features, 4 if features <= 4096 else 8


@functools.cache
def forward_launch(n: int) -> Launch:
    tokens, features, warps = forward_tile(n)
    return Launch(rms_kernel, BT=tokens, BN=features, num_warps=warps)


@functools.cache
def backward_launch(n: int, sums: bool) -> Launch:
    return Launch(rms_backward_kernel, SUMS=sums, CHUNK=CHUNK_TOKENS, **row_constants(n))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, scale: torch.Tensor) -> None:
    """Fills ``y`` and ``scale``."""
    x, weight = _native.rows_view(x), weight.contiguous()
    if x.numel():
        forward(x, weight, eps, y, scale, len(x), x.stride(0))
    elif len(x):
        scale.fill_(float("nan"))  # a row of no features has no mean


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    scale: torch.Tensor,
    n_tokens: int,
    stride: int,
) -> None:
    """`rms_norm` of ``x`` with any number of axes, whose rows lie ``stride`` apart."""
    n = weight.shape[0]
    grid = (_triton.ceil_div(n_tokens, forward_tile(n)[0]),)
    forward_launch(n)(grid, (x, weight, y, scale), (n, stride), (n_tokens,), (eps,))


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
    dx: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Fills ``dx``, and without ``offsets`` nothing else; ``sums`` holds zeros before."""
    dy, x = _native.rows_view(dy), _native.rows_view(x)
    weight, scale = weight.contiguous(), scale.contiguous()
    n_tokens, n = x.shape
    if x.numel() == 0:
        return
    if offsets is None:
        backward(dy, x, weight, scale, dx, (dy.stride(0), x.stride(0)), n_tokens)
    elif offsets.numel() > 1:
        chunks = cut(offsets, n_tokens, CHUNK_TOKENS, always=False)
        partial = torch.empty(1, chunks.n_slots, n, dtype=torch.float32, device=x.device)
        strides = dy.stride(0), x.stride(0)
        backward(dy, x, weight, scale, dx, strides, n_tokens, (sums, partial, 0, chunks))
        reduce_partials(partial[0], sums, chunks, 1)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dx: torch.Tensor,
    strides: tuple[int, int],
    n_tokens: int,
    into: tuple[torch.Tensor, torch.Tensor, int, Chunks] | None = None,
) -> None:
    """`rms_norm_backward` of tensors with any number of axes, whose rows lie ``strides`` apart.

    ``into``: where sums go: ``out`` of a segment of one chunk without a slot, ``partial`` and the place in it of the
    others, and the chunks.
    """
    n = weight.shape[0]
    launch = backward_launch(n, into is not None)
    if into is None:
        grid = (_triton.ceil_div(n_tokens, CHUNK_TOKENS),)
        # Nothing is read or written through the last three.
        launch(grid, (dy, x, weight, scale, dx, scale, scale, scale), (n, *strides, 0), (0, n_tokens))
        return
    out, partial, place, chunks = into
    pointers = dy, x, weight, scale, dx, out, partial, chunks.table
    launch((chunks.n_items,), pointers, (n, *strides, place), (chunks.n_segments, n_tokens))
