"""Words of block pairs (`_device_plan.pair_words`) in a kernel's registers, and the signs that they stand for."""

from __future__ import annotations

import triton
import triton.language as tl

SIGN_BIT: tl.constexpr = tl.constexpr(-(1 << 31))  # of a float32
WARP: tl.constexpr = tl.constexpr(32)


@triton.jit
def pick(values, lane, index):
    """``values[index]`` of a vector that lives in registers: a few shuffles instead of a load in the loop."""
    return tl.sum(tl.where(lane == index, values, 0), 0)


@triton.jit
def pick_word(words, behind, lane, index, PAIRS: tl.constexpr):
    """`pick` of PAIRS words, ``behind`` those behind the first WARP: one vector of all would be spread over warps,
    which would wait for each other."""
    if PAIRS > WARP:
        return pick(words, lane, index) | pick(behind, lane + WARP, index)
    else:
        return pick(words, lane, index)


@triton.jit
def share_of(first, slab, share, most):
    """A program's part of the pairs, or entries, of a slab, of which each has ``most``: the first one, and how many."""
    begin = tl.load(first + slab) + share * most
    return begin, tl.maximum(tl.minimum(most, tl.load(first + slab + 1) - begin), 0)


@triton.jit
def block_of(word):
    """The row block of a pair."""
    return (word >> 48 & 0x7FFF).to(tl.int32)


@triton.jit
def columns_of(word, j, SLAB_COLS: tl.constexpr):
    """The columns that a pair adds to columns ``j`` of the slab."""
    c = (word >> 32 & 0xFFFF).to(tl.int32) * SLAB_COLS + (j ^ (word >> 16 & 0xFFFF).to(tl.int32))
    return tl.max_contiguous(tl.multiple_of(c, 8), 8)


@triton.jit
def matrix_of(
    block,
    d_0,
    d_1,
    d_2,
    rows_0,
    rows_1,
    rows_2,
    stride_0,
    stride_1,
    stride_2,
    begin_1,
    begin_2,
    ALONE: tl.constexpr,
):
    """Of the matrices of a stack that which has a row block: where it is, its rows, their stride, and the block's
    number in it."""
    if ALONE:
        d, rows, stride = d_0, rows_0, stride_0
    else:
        in_1, in_2 = block >= begin_1, block >= begin_2
        d = tl.where(in_2, d_2, tl.where(in_1, d_1, d_0))
        rows = tl.where(in_2, rows_2, tl.where(in_1, rows_1, rows_0))
        stride = tl.where(in_2, stride_2, tl.where(in_1, stride_1, stride_0))
        block = block - tl.where(in_2, begin_2, tl.where(in_1, begin_1, 0))
    return d, rows, stride, block


@triton.jit
def _row_signs(row_sign, word, i, padded_rows, SLAB_ROWS: tl.constexpr):
    """Of the rows that pair ``word`` adds to rows ``i`` of the slab, times the pair's own."""
    row = (word >> 48 & 0x7FFF).to(tl.int32) * SLAB_ROWS + (i ^ (word & 0xFFFF).to(tl.int32))
    return tl.load(row_sign + tl.where(word < 0, padded_rows, 0) + row).to(tl.float32)


@triton.jit
def row_flips(row_sign, word, after, more, i, padded_rows, SLAB_ROWS: tl.constexpr):
    """Int32: the sign bit where rows ``i`` of the slab have another sign by pair ``word`` than by the one ``after`` it,
    or, where there is no ``more``, than +."""
    sign = _row_signs(row_sign, word, i, padded_rows, SLAB_ROWS)
    sign *= tl.where(more, _row_signs(row_sign, after, i, padded_rows, SLAB_ROWS), 1.0)
    return sign.to(tl.int32, bitcast=True) & SIGN_BIT
