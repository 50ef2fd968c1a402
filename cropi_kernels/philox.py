"""Philox4x32-10, the one source of randomness: numpy twin of ``csrc/include/cropi/philox.h``.

Word ``w`` of draw ``(c0, c1, c2, c3)`` under a 64-bit key is a pure function (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): no state, no table, the same integers on every backend, and any part of a
sketch can be drawn without the rest. ``tests/kernels/vectors/sketch_v1.json`` pins the values.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]

# What a draw is for. The number is counter word c2, so that two uses of one key never share a draw.
# 0 and 1 were those of the CountSketch of version 1.
COLUMN_SIGN, COLUMN_FOLD, ROW_SIGN, ROW_FOLD, PAIR = 2, 3, 4, 5, 6
REDUCE_SIGN, REDUCE_FOLD, DENSE_ROWS, DENSE_COLUMNS, TENSOR_ROWS, TENSOR_COLUMNS = 7, 8, 9, 10, 11, 12
PROJECT_SIGN, PROJECT_TILE, PROJECT_KEEP, PROJECT_RADEMACHER, PROJECT_GAUSSIAN = 13, 14, 15, 16, 17


def key_of(version: int, seed: int, name: str) -> tuple[int, int]:
    """The 64-bit key of a name: first 8 bytes, little endian, of SHA-256("cropi-sketch/VERSION\\nSEED\\nNAME")."""
    digest = hashlib.sha256(f"cropi-sketch/{version}\n{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(key: tuple[int, int], c0: object, c1: object = 0, c2: object = 0, c3: object = 0) -> U32:
    """Draws for broadcast counters: uint32 array of shape ``broadcast(c0, c1, c2, c3) + (4,)``."""
    counters = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    x0, x1, x2, x3 = (c.astype(np.uint64) for c in counters)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (p1 >> shift) ^ x1 ^ k0, p1 & low, (p0 >> shift) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def signs(key: tuple[int, int], n: int, purpose: int, first: int = 0) -> NDArray[np.float32]:
    """``n`` Rademacher signs from index ``first`` on: bit ``i % 32`` of word ``i % 128 // 32`` of draw ``i // 128``."""
    if n == 0:
        return np.zeros(0, np.float32)
    start = first // 128
    words = philox(key, np.arange(start, (first + n - 1) // 128 + 1), 0, purpose)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(-1), bitorder="little")
    chosen = bits[first - 128 * start : first - 128 * start + n]
    return 1 - 2 * chosen.astype(np.float32)


def offsets(key: tuple[int, int], n_blocks: int, width: int, purpose: int) -> U32:
    """One XOR offset per block: a multiple of 8 below ``width`` (a power of two), from word 0 of draw ``block``."""
    words = philox(key, np.arange(n_blocks), 0, purpose)[..., 0]
    return xor_offset(words, width)


def xor_offset(words: U32, size: int) -> U32:
    """Maps draws to multiples of 8 below ``size`` (0 where ``size`` is at most 8): vector loads stay whole."""
    return words & np.uint32((size - 1) & ~7)
