"""The projection as an explicit matrix, from the same integers: the oracle of the kernels, in any float dtype.

Coordinate ``p`` of nonzero ``j`` lies in tile ``t = p // width`` at ``i = p % width``. With draws of
``philox(key, low and high word of the counter, purpose, third word)`` and ``g = gcd(width, 16)``::

    shift  = g * (word 0 of TILE[t, j] * (width / g) >> 32),   low = word 1 of TILE[t, j] mod g
    bucket = j * width + ((i + shift) mod width) ^ low
    sign   = - where bit p % 128 of SIGN[p // 128, j] is set

Rademacher entry (p, c): bit ``c % 32`` of word ``c % 128 // 32`` of RADEMACHER[p, c // 128]. Gaussian entry: number
``c % 128 // 32`` of the four normals of GAUSSIAN[p, 32 (c // 128) + c % 32], by Box and Muller (1958).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ...philox import (
    PROJECT_GAUSSIAN,
    PROJECT_KEEP,
    PROJECT_RADEMACHER,
    PROJECT_SIGN,
    PROJECT_TILE,
    U32,
    philox,
)
from .spec import KEEP_ALL, ProjectionSpec

_BLOCK = 1 << 22  # entries of an explicit block
_DRAWN = 1 << 20  # nonzeros whose buckets and signs are held at a time: 24 bytes each


def _draw(spec: ProjectionSpec, counter: NDArray[np.uint64], purpose: int, third: object = 0) -> U32:
    low, high = counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32)
    return philox(spec.key, low, high, purpose, third)


def _bits(spec: ProjectionSpec, p: NDArray[np.uint64], purpose: int, third: int) -> NDArray[np.bool_]:
    """Bit ``p % 128`` of draw ``p // 128`` for each coordinate; every draw is made once."""
    draws, index = np.unique(p >> np.uint64(7), return_inverse=True)
    word = _draw(spec, draws, purpose, third)[index, (p >> np.uint64(5)).astype(np.int64) & 3]
    bits: NDArray[np.bool_] = (word >> (p & np.uint64(31)).astype(np.uint32) & np.uint32(1)).astype(bool)
    return bits


def coordinates(spec: ProjectionSpec, p: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Buckets int64 [nnz, n] and signs float32 [nnz, n] (+1, -1; 0 where dropped) of coordinates ``p`` uint64 [n]."""
    width, group = np.uint64(spec.width), np.uint64(spec.group)
    tiles, index = np.unique(p // width, return_inverse=True)
    kept = kept_coordinates(spec, p)
    bucket, sign = [], []
    for j in range(spec.nnz):
        words = _draw(spec, tiles, PROJECT_TILE, j).astype(np.uint64)
        shift = (words[:, 0] * (width // group) >> np.uint64(32)) * group
        low = words[:, 1] & (group - np.uint64(1))
        place = (p % width + shift[index]) % width ^ low[index]
        bucket.append(place.astype(np.int64) + j * spec.width)
        negative = _bits(spec, p, PROJECT_SIGN, j)
        sign.append(np.where(negative, np.float32(-1), np.float32(1)) * kept)
    return np.stack(bucket), np.stack(sign).astype(np.float32)


def kept_coordinates(spec: ProjectionSpec, p: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``p`` the dropout keeps: a Bernoulli bit from fair bits, least significant digit of ``keep`` first."""
    kept = np.full(p.shape, spec.keep_count == KEEP_ALL)
    if spec.keep_count < KEEP_ALL:
        for level in range(16):
            fair = _bits(spec, p, PROJECT_KEEP, level)
            kept = fair | kept if spec.keep_count >> level & 1 else fair & kept
    return kept


def dense_block(spec: ProjectionSpec, p: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Entries float64 [n, dim] of the dense kinds, unscaled, zero rows for dropped coordinates."""
    blocks = np.arange(-(-spec.dim // 128), dtype=np.uint64)
    block: NDArray[np.float64]
    if spec.kind == "rademacher":
        words = _draw(spec, p[:, None], PROJECT_RADEMACHER, blocks[None])  # [n, blocks, 4]
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
        block = 1.0 - 2.0 * bits.reshape(len(p), -1).astype(np.float64)
    else:
        third = blocks[:, None] * np.uint64(32) + np.arange(32, dtype=np.uint64)
        words = _draw(spec, p[:, None, None], PROJECT_GAUSSIAN, third[None])  # [n, blocks, 32, 4]
        radius = np.sqrt(-2.0 * np.log(((words[..., 0::2] >> np.uint32(8)) + 1.0) / 2.0**24))
        angle = words[..., 1::2] * (2.0 * math.pi / 2.0**32)
        normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # [n, blocks, 32, 2, 2]
        block = np.moveaxis(normals.reshape(len(p), len(blocks), 32, 4), -1, -2).reshape(len(p), -1)
    result: NDArray[np.float64] = block[:, : spec.dim] * kept_coordinates(spec, p)[:, None]
    return result


def matrix(spec: ProjectionSpec, offset: int, n: int) -> NDArray[np.float64]:
    """S^T: float64 [n, dim], scaled, for coordinates ``offset .. offset + n``."""
    p = np.arange(n, dtype=np.uint64) + np.uint64(offset)
    if not spec.sparse:
        return dense_block(spec, p) * spec.scale
    out = np.zeros((n, spec.dim))
    bucket, sign = coordinates(spec, p)
    for j in range(spec.nnz):
        out[np.arange(n), bucket[j]] = sign[j]
    return out * spec.scale


def _blocks(spec: ProjectionSpec, offset: int, n: int) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """Columns and their coordinates, as many at a time as an explicit block may have."""
    step = max(1, _DRAWN // spec.nnz if spec.sparse else _BLOCK // spec.dim)
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield slice(start, stop), np.arange(start, stop, dtype=np.uint64) + np.uint64(offset)


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T`` in ``out``'s dtype, block by block."""
    for columns, p in _blocks(spec, offset, x.shape[1]):
        piece = x[:, columns].to(out.dtype)
        if not spec.sparse:
            piece = piece.where(
                torch.from_numpy(kept_coordinates(spec, p)).to(out.device), torch.zeros_like(piece)
            )
            out += piece @ torch.from_numpy(dense_block(spec, p) * spec.scale).to(out)
            continue
        bucket, sign = coordinates(spec, p)
        for j in range(spec.nnz):
            value = torch.from_numpy(sign[j]).to(out)
            kept = piece.where(value != 0, torch.zeros_like(piece))  # 0 * NaN would be NaN
            out.index_add_(1, torch.from_numpy(bucket[j]).to(out.device), kept * (value * spec.scale))


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out = y S`` for ``out`` [B, n], in ``out``'s dtype."""
    wide = y.to(out.dtype)
    for columns, p in _blocks(spec, offset, out.shape[1]):
        piece = out[:, columns]
        if not spec.sparse:
            piece.copy_(wide @ torch.from_numpy(dense_block(spec, p) * spec.scale).to(out).T)
            continue
        bucket, sign = coordinates(spec, p)
        piece.zero_()
        for j in range(spec.nnz):
            value = torch.from_numpy(sign[j]).to(out) * spec.scale
            piece += wide[:, torch.from_numpy(bucket[j]).to(out.device)] * value
