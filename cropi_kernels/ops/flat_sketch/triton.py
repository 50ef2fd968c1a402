"""Triton kernels behind `flat_sketch`: a scatter whose sums have no order.

Coordinates fall on hashed numbers of the sketch, and float additions in the order of arrival would differ from run to
run. So the sums are integers: every value is a multiple of a unit that is chosen from the largest one, such that no sum
of n values overflows 64 bits. The unit is below ``n 2^-60`` of that largest value, far below float32's own rounding;
integer additions commute, so that the result is the same bits on every run and on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import _gpu
from ...philox import FLAT_KEEP, FLAT_PLACE

DRAWS = 256  # of a program, four coordinates each
FLUSH = 1024


@triton.jit
def _power_of_two(exponent):
    """2^exponent in float64, for exponents from -1022 to 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _top_exponent(largest):
    """e with ``largest < 2^e``; 129 where it is infinite or not a number."""
    return (largest.to(tl.int32, bitcast=True) >> 23 & 0xFF) - 126


@triton.jit
def _add(x, total, i, word, kept, n, mask, unit):
    inside = (i >= 0) & (i < n) & kept
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float64) * unit
    value = tl.where(word >> 31 != 0, -value, value).to(tl.int64)
    tl.atomic_add(total + (word & mask).to(tl.int64), value, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n", "first", "skip", "k0", "k1", "keep_below", "bits"])
def scatter_kernel(
    x,  # float32 [n]
    total,  # int64 [dim]
    largest,  # float32 [1], of the absolute values
    n,
    first,  # the draw of coordinate 0
    skip,  # words of that draw that belong to coordinates before x
    k0,  # as int32 bit patterns, so that every value has one type
    k1,
    keep_below,
    mask,  # dim - 1
    bits,  # log2 of a power of two above n
    DROP: tl.constexpr,
    PLACE: tl.constexpr,
    KEEP: tl.constexpr,
    DRAWS: tl.constexpr,
):
    exponent = _top_exponent(tl.load(largest))
    if exponent <= 128:
        # |x| < 2^exponent and n < 2^bits: the sums stay below 2^62.
        unit = _power_of_two(62 - bits - exponent)
        line = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
        draw = (line + first).to(tl.uint64)
        c0, c1 = (draw & 0xFFFFFFFF).to(tl.uint32), (draw >> 32).to(tl.uint32)
        low, high = k0.to(tl.uint32), k1.to(tl.uint32)
        zero = tl.zeros((DRAWS,), tl.uint32)
        # As csrc/include/cropi/philox.h.
        w0, w1, w2, w3 = tl.philox_impl(c0, c1, zero + PLACE, zero, low, high)
        m0, m1, m2, m3 = line >= 0, line >= 0, line >= 0, line >= 0
        if DROP:
            d0, d1, d2, d3 = tl.philox_impl(c0, c1, zero + KEEP, zero, low, high)
            below = keep_below.to(tl.uint32)
            m0, m1, m2, m3 = d0 < below, d1 < below, d2 < below, d3 < below
        i = line * 4 - skip
        _add(x, total, i, w0, m0, n, mask, unit)
        _add(x, total, i + 1, w1, m1, n, mask, unit)
        _add(x, total, i + 2, w2, m2, n, mask, unit)
        _add(x, total, i + 3, w3, m3, n, mask, unit)


@triton.jit(do_not_specialize=["bits"])
def flush_kernel(total, out, largest, dim, bits, scale, BLOCK: tl.constexpr):
    """``out += scale * total``, out of units; not a number throughout where the largest value is not finite."""
    exponent = _top_exponent(tl.load(largest))
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < dim
    unit = _power_of_two(exponent + bits - 62)
    sums = (tl.load(total + i, mask=inside, other=0).to(tl.float64) * unit).to(tl.float32) * scale
    sums = tl.where(exponent <= 128, sums, float("nan"))
    tl.store(out + i, tl.load(out + i, mask=inside, other=0.0) + sums, mask=inside)


def flat_sketch(
    x: torch.Tensor, key: tuple[int, int], keep_below: int, scale: float, out: torch.Tensor, offset: int
) -> None:
    """``out += scale * countsketch(x)`` for contiguous float32 ``x`` whose first coordinate is ``offset``."""
    flat, dim = x.reshape(-1), out.numel()
    n, bits = flat.numel(), flat.numel().bit_length()
    if n == 0:
        return
    largest = torch.linalg.vector_norm(flat, float("inf"))
    total = torch.zeros(dim, dtype=torch.int64, device=x.device)
    first, skip = divmod(offset, 4)
    with _gpu.on(x):
        scatter_kernel[(triton.cdiv(n + skip, 4 * DRAWS),)](
            flat, total, largest, n, first, skip, *map(_signed, (*key, keep_below)), dim - 1, bits,
            DROP=keep_below != 0, PLACE=FLAT_PLACE, KEEP=FLAT_KEEP, DRAWS=DRAWS, num_warps=4,
        )  # fmt: skip
        flush_kernel[(triton.cdiv(dim, FLUSH),)](
            total, out, largest, dim, bits, scale, BLOCK=FLUSH, num_warps=4
        )


def _signed(word: int) -> int:
    """The int32 with the bits of a uint32."""
    return word - (word >> 31 << 32)
