"""What a sparse projection draws for a window of coordinates, in memory, for the Triton kernels that share it."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..._launch import Launch
from ...philox import PROJECT_KEEP, PROJECT_SIGN, PROJECT_TILE
from .spec import KEEP_ALL, ProjectionSpec

BLOCK = 128


@triton.jit
def _draw(key, counter, purpose: tl.constexpr, third):
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero + purpose, zero + third)


@triton.jit
def _store(to, i, n, w0, w1, w2, w3):
    """to[4 i + m] = word m, for i < n."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    pair = tl.arange(0, 2)
    at = to + (i[:, None, None] * 4 + pair[None, :, None] * 2 + pair[None, None, :])
    tl.store(at, words, mask=(i < n)[:, None, None])


@triton.jit(
    do_not_specialize=[
        "k0", "k1", "first_draw", "draws", "keep", "first_level", "first_tile", "tiles", "groups", "sign_blocks"
    ]
)  # fmt: skip
def draws_kernel(
    signs,  # [nonzeros, 4 draws]: word m of draw first_draw + i for nonzero j at [j, 4 i + m]
    keeps,  # [4 draws]: the mask of the dropout in the same order
    places,  # [nonzeros, tiles]: shift + low of tile first_tile + t for nonzero j
    k0,  # the key's words as signed numbers
    k1,
    first_draw,
    draws,
    keep,
    first_level,  # the lowest digit of `keep` that is 1: below it nothing is kept
    first_tile,
    tiles,
    groups,
    sign_blocks,  # programs beyond them draw places
    SIGN: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = k1.to(tl.int64) << 32 | k0.to(tl.int64) & 0xFFFFFFFF
    if block < sign_blocks:
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = _draw(key, first_draw + i, SIGN, j.to(tl.uint32))
        _store(signs + j * draws * 4, i, draws, w0, w1, w2, w3)
        if DROPS:
            if j == 0:
                w0 = (i * 0).to(tl.uint32)
                w1, w2, w3 = w0, w0, w0
                for level in range(first_level, 16):
                    f0, f1, f2, f3 = _draw(key, first_draw + i, KEEP, level)
                    digit = ((keep >> level) & 1) == 1
                    w0 = tl.where(digit, f0 | w0, f0 & w0)
                    w1 = tl.where(digit, f1 | w1, f1 & w1)
                    w2 = tl.where(digit, f2 | w2, f2 & w2)
                    w3 = tl.where(digit, f3 | w3, f3 & w3)
                _store(keeps, i, draws, w0, w1, w2, w3)
    else:
        t = (block - sign_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        w0, w1, _, _ = _draw(key, first_tile + t, TILE, j.to(tl.uint32))
        shift = ((w0.to(tl.int64) * groups) >> 32) * GROUP
        place = (shift + (w1 & (GROUP - 1)).to(tl.int64)).to(tl.int32)
        tl.store(places + j * tiles + t, place, mask=t < tiles)


@functools.cache
def _draws(group: int, drops: bool) -> Launch:
    purposes = {"SIGN": PROJECT_SIGN, "KEEP": PROJECT_KEEP, "TILE": PROJECT_TILE}
    return Launch(draws_kernel, **purposes, GROUP=group, DROPS=drops, BLOCK=BLOCK, num_warps=4)


class Window:
    """The draws of the tiles that hold coordinates [begin, end)."""

    def __init__(self, spec: ProjectionSpec, begin: int, end: int, device: torch.device) -> None:
        first_tile, last_tile = begin // spec.width, (end - 1) // spec.width
        self.start, self.tiles = first_tile * spec.width, last_tile - first_tile + 1
        first_draw = self.start // 128
        self.phase = self.start - first_draw * 128
        self.draws = ((last_tile + 1) * spec.width - 1) // 128 - first_draw + 1
        k0, k1 = (word - (word >> 31 << 32) for word in spec.key)
        make = lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)  # noqa: E731
        drops, keep = spec.keep_count < KEEP_ALL, spec.keep_count
        self.signs, self.places = make(spec.nnz, 4 * self.draws), make(spec.nnz, self.tiles)
        self.keeps = make(4 * self.draws) if drops else self.signs
        sign_blocks = triton.cdiv(self.draws, BLOCK)
        _draws(spec.group, drops)(
            (sign_blocks + triton.cdiv(self.tiles, BLOCK), spec.nnz),
            (self.signs, self.keeps, self.places),
            counts=(
                k0, k1, first_draw, self.draws, keep, (keep & -keep).bit_length() - 1, first_tile, self.tiles,
                spec.width // spec.group, sign_blocks,
            ),
        )  # fmt: skip
