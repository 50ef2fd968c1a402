"""Tensor cores: which lane holds which element (PTX ISA, "matrix fragments" and "asynchronous warpgroup level").

Products are exact in float32 and so are most sums here; a tensor core may round inside a sum, so results are compared
within a bound, never to the bit.
"""

from __future__ import annotations

import functools

import numpy as np

from ptx_emulator.numbers import Array, from_bfloat16, from_float16, halves

LANE = np.arange(32)
ROW, PAIR = LANE >> 2, (LANE & 3) * 2  # of a lane's first element in an 8 x 8 fragment


def numbers_of(bits: Array, kind: str) -> Array:
    return from_bfloat16(bits) if kind == "bf16" else from_float16(bits)


def fragment(words: list[Array], places: list[tuple[int, int]], shape: tuple[int, int], kind: str) -> Array:
    """A warp's operand [warps, *shape] from registers [warps, 32] of two 16-bit numbers side by side in a row.

    ``places``: of each register, the 8 x 8 block's first row and column.
    """
    out = np.empty((len(words[0]), *shape), np.float32)
    for word, (row, column) in zip(words, places, strict=True):
        for i, half in enumerate(halves(word)):
            out[:, row + ROW, column + PAIR + i] = numbers_of(half, kind)
    return out


A_PLACES = [(0, 0), (8, 0), (0, 8), (8, 8)]  # of m16n8k16's and wgmma's A: rows, k
B_PLACES = [(0, 0), (0, 8)]  # of m16n8k16's B: columns, k


def accumulator(words: list[Array]) -> Array:
    """[warps, 16, 2 registers] from float32 registers: pairs of columns of row g, then of row g + 8, per 8 columns."""
    # Of a register: its 8 columns, its half of the rows, and which of the pair; of a lane: row and pair.
    given = np.stack(words).view(np.float32).reshape(-1, 2, 2, len(words[0]), 8, 4)
    return given.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, len(words) * 2)


def registers(values: Array, n: int) -> list[Array]:
    """`accumulator`, backwards."""
    parts = values.reshape(-1, 2, 8, n // 4, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(parts.reshape(n, -1, 32).view(np.uint32))


def mma(a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
    """m16n8k16 of every warp: registers [warps, 32] in, registers out."""
    left = fragment(a, A_PLACES, (16, 16), kind)
    right = fragment(b, B_PLACES, (8, 16), kind)
    return registers(left @ right.transpose(0, 2, 1) + accumulator(c), 4)


def descriptor_addresses(descriptor: int, n: int, transposed: bool) -> Array:
    """Addresses [n, 16 k] of a 16-bit operand in shared memory, from a wgmma matrix descriptor.

    Transposed: the n index is contiguous ("MN-major"), in atoms as wide as the swizzle.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3]
    assert swizzle and descriptor >> 49 & 7 == 0, "operands without a swizzle, or off the grain of one"
    i, k = np.arange(n)[:, None], np.arange(16)[None, :]
    width = 16 << swizzle  # bytes of a row of the atom; 8 rows make the atom
    if transposed:
        atom = width // 2
        address = start + i // atom * leading + i % atom * 2 + k // 8 * stride + k % 8 * width
    else:
        assert width >= 32
        address = start + i // 8 * stride + i % 8 * width + k * 2
    return address ^ (address >> 7 & (1 << swizzle) - 1) << 4


@functools.lru_cache(maxsize=1000)
def descriptor_lines(descriptor: int, n: int, transposed: bool) -> Array:
    """Where every eight neighbours of `descriptor_addresses`, 16 bytes, begin: along k, or along the other index where
    that is contiguous."""
    address = descriptor_addresses(descriptor, n, transposed)
    lines = (address.T if transposed else address).reshape(-1, 8)
    assert (lines == lines[:, :1] + 2 * np.arange(8)).all()
    return lines[:, 0].copy()
