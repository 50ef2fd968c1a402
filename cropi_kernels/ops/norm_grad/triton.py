"""Triton kernels behind `norm_grad` and `bias_grad`: one read of x and dy, a partial sum per chunk of a segment."""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl

from ... import _native, _triton
from ..._launch import Launch, padded
from .._triton_segments import Chunks, along_second, chunk_of, cut, reduce_partials, second

# Measured on an H100, q, k and v of 16384 tokens: 32 us; 16 x 256 numbers a step and 4 warps took 84.
BIAS_TOKENS, BIAS_FEATURES, BIAS_WARPS = 32, 64, 2
CHUNK_TOKENS = 32  # measured on an H200, 1536 features: 55 us, 64 tokens 64 us, 128 tokens 97 us


@triton.jit
def load_rows(x, stride, t, i, mask):
    return tl.load(x + t[:, None] * stride + i[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n_segments"])
def norm_kernel(
    x,  # [tokens, n], rows stride_x apart; dy likewise
    dy,
    weight,  # float32 [segments, n]
    bias,
    partial,  # float32, from weight_at on [slots, n] of the weight, from bias_at on [slots, n] of the bias
    table,  # of the chunks
    n,
    stride_x,
    stride_dy,
    weight_at,
    bias_at,
    n_segments,
    eps,
    CENTERED: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,  # False: a chunk has one step, of BT tokens
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Statistics in float32, of the centred values: two passes over registers, no cancellation."""
    segment, t0, t1, slot = chunk_of(table, tl.program_id(0).to(tl.int64))
    if segment < n_segments:
        i = tl.arange(0, BN)
        inside = i < n
        w = tl.zeros((BN,), tl.float32)
        b = tl.zeros((BN,), tl.float32)
        t = t0 + tl.arange(0, BT)
        live = (t < t1)[:, None] & inside[None, :]
        g_rows, v_rows = load_rows(dy, stride_dy, t, i, live), load_rows(x, stride_x, t, i, live)
        for _ in range(0, tl.cdiv((t1 - t0).to(tl.int32), BT)):
            g, v, mask = g_rows.to(tl.float32), v_rows.to(tl.float32), live
            # On their way while these are summed: a row's statistics take its warps a barrier or two.
            if AHEAD:
                t += BT
                live = (t < t1)[:, None] & inside[None, :]
                g_rows, v_rows = load_rows(dy, stride_dy, t, i, live), load_rows(x, stride_x, t, i, live)
            if WITH_BIAS:
                b += tl.sum(g, 0)
            if CENTERED:
                v = tl.where(mask, v - (tl.sum(v, 1) / n)[:, None], 0.0)
            squares = v * v
            if BN <= 128:  # as in `rms_kernel`
                squares = tl.where(mask, squares, 0.0)
            scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / n + eps)
            # Rows past the end have g = 0; their scale is finite wherever eps > 0, and made so where it is not.
            w += tl.sum(tl.where(mask, g * (v * scale[:, None]), 0.0), 0)
        target = tl.where(slot < 0, weight + segment * n, partial + weight_at + slot * n)
        tl.store(target + i, w, mask=inside)
        if WITH_BIAS:
            target = tl.where(slot < 0, bias + segment * n, partial + bias_at + slot * n)
            tl.store(target + i, b, mask=inside)


@triton.jit(do_not_specialize=["begin_1", "begin_2", "n_segments"])
def sums_kernel(
    dy_0,  # [tokens, n_0], rows stride_0 apart
    dy_1,
    dy_2,
    out,  # float32 [segments, n_0]
    partial,  # float32, from at_0 on [slots, n_0] of the first, and so on
    table,  # of the chunks
    n_0,
    n_1,
    n_2,
    stride_0,
    stride_1,
    stride_2,
    at_0,
    at_1,
    at_2,
    begin_1,  # first block of BN features of the second
    begin_2,
    n_segments,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    segment, t0, t1, slot = chunk_of(table, tl.program_id(0).to(tl.int64))
    if segment < n_segments:
        block = second()
        in_1, in_2 = block >= begin_1, block >= begin_2
        dy = tl.where(in_2, dy_2, tl.where(in_1, dy_1, dy_0))
        n = tl.where(in_2, n_2, tl.where(in_1, n_1, n_0))
        stride = tl.where(in_2, stride_2, tl.where(in_1, stride_1, stride_0))
        at = tl.where(in_2, at_2, tl.where(in_1, at_1, at_0))
        begin = tl.where(in_2, begin_2, tl.where(in_1, begin_1, 0))
        i = (block - begin).to(tl.int64) * BN + tl.arange(0, BN)
        inside = i < n
        total = tl.zeros((BN,), tl.float32)
        for step in range(0, tl.cdiv((t1 - t0).to(tl.int32), BT)):
            t = t0 + step * BT + tl.arange(0, BT)
            mask = (t < t1)[:, None] & inside[None, :]
            total += tl.sum(
                tl.load(dy + t[:, None] * stride + i[None, :], mask=mask, other=0.0).to(tl.float32), 0
            )
        target = tl.where(slot < 0, out + segment * n, partial + at + slot * n)
        tl.store(target + i, total, mask=inside)


def row_constants(n: int) -> dict[str, int]:
    """Tokens, features and warps of a program of `norm_kernel`, and whether a chunk has rows to fetch while others are
    summed.

    Measured on an H200, in turns, microseconds with what came before (twice the tokens, half the warps, every row
    fetched when its turn came) in front, of norms and of fused norms' backward passes: 8192 x 3584 57.5, 41.7; 66, 55.
    16384 x 3584 75.7, 83.3; 130, 106. 16384 x 1536 43, 40; 52, 53. 8192 x 8192 80, 83; 141, 115. Rows of 128 are slower
    in parts of 16 (371 for 328; 388 for 335), and gain nothing from being fetched ahead. It is one choice for any
    number of rows, though 16384 x 3584 lost 10 %: the number of warps decides the order of a row's sums, and a
    segment's result must not depend on how much company it has.
    """
    features = max(16, _triton.next_power_of_two(n))
    if features <= 128:
        tokens, warps = min(CHUNK_TOKENS, 4096 // features), 4
    else:
        tokens, warps = max(1, 2048 // features), 4 if features <= 2048 else 8 if features <= 4096 else 16
    return {"AHEAD": tokens < CHUNK_TOKENS, "BT": tokens, "BN": features, "num_warps": warps}


@functools.cache
def norm_launch(n: int, centered: bool, with_bias: bool) -> Launch:
    return Launch(norm_kernel, CENTERED=centered, WITH_BIAS=with_bias, **row_constants(n))


@functools.cache
def sums_launch(features: int) -> Launch:
    return Launch(sums_kernel, BT=BIAS_TOKENS, BN=features, num_warps=BIAS_WARPS)


def add_sums(
    dys: list[torch.Tensor],
    strides: list[int],
    out: torch.Tensor,
    partial: torch.Tensor,
    places: list[int],
    chunks: Chunks,
) -> None:
    """One launch: the sums over the chunks' tokens of several gradients, from ``places`` on in ``partial``."""
    sizes = [dy.shape[-1] for dy in dys]
    block = min(BIAS_FEATURES, max(16, _triton.next_power_of_two(max(sizes))))
    ends = list(itertools.accumulate(_triton.ceil_div(n, block) for n in sizes))
    sums_launch(block)(
        (chunks.n_items, *along_second(ends[-1])),
        (*padded(dys), out, partial, chunks.table),
        (*padded(sizes), *padded(strides), *padded(places)),
        (*padded(ends)[:2], chunks.n_segments),
    )


def norm_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Fills ``weight`` and ``bias`` [segments, n], zeros before; one of no rows is not wanted, and is not computed."""
    x, dy = _native.rows_view(x), _native.rows_view(dy)
    n_tokens, n = dy.shape
    if n_tokens == 0 or offsets.numel() == 1:
        return
    chunks = cut(offsets, n_tokens, CHUNK_TOKENS, always=False)
    wanted = [sums for sums in (weight, bias) if sums.numel()]
    partial = torch.empty(len(wanted), chunks.n_slots, n, dtype=torch.float32, device=dy.device)
    if weight.numel():
        norm_launch(n, centered, bias.numel() > 0)(
            (chunks.n_items,),
            (x, dy, weight, bias, partial, chunks.table),
            (n, x.stride(0), dy.stride(0), 0, chunks.n_slots * n),
            (chunks.n_segments,),
            (eps,),
        )
    else:
        add_sums([dy], [dy.stride(0)], bias, partial, [0], chunks)
    for sums, part in zip(wanted, partial, strict=True):
        reduce_partials(part, sums, chunks, 1)
