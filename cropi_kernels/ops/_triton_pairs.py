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
def row_signs(row_sign, word, i, padded_rows, SLAB_ROWS: tl.constexpr):
    """Of the rows that pair ``word`` adds to rows ``i`` of the slab, times the pair's own."""
    row = (word >> 48 & 0x7FFF).to(tl.int32) * SLAB_ROWS + (i ^ (word & 0xFFFF).to(tl.int32))
    return tl.load(row_sign + tl.where(word < 0, padded_rows, 0) + row).to(tl.float32)
