"""CountSketch and SJLT of rows in Triton, for GPUs without the CUDA C++ build.

A program owns a block of buckets and gathers the coordinates that land there, tile after tile: sums in registers, no
atomics. Triton has no way to share one draw among 128 elements, so signs, kept coordinates and tile places of a window
of coordinates are drawn into memory first (at most 8 MB, which stays in the second-level cache), and the XOR below 16
leaves single loads where CUDA C++ has 16-byte ones. Float32 in is still bound by memory; half-width input is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import _gpu
from ...philox import PROJECT_KEEP, PROJECT_SIGN, PROJECT_TILE
from .spec import KEEP_ALL, ProjectionSpec

WINDOW = 1 << 25  # coordinates times nonzeros whose draws are in memory at once
DRAW_BLOCK, SPREAD_BLOCK = 256, 1024
ADD_PARTS, ADD_COLUMNS = 32, 64
_PROGRAMS = 1024  # per row; from the sizes alone, as the bits are
_TILES_PER_PART = 8
_WORKSPACE = 64 << 20


@triton.jit
def _draw(key, counter, purpose: tl.constexpr, third):
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero + purpose, zero + third)


@triton.jit
def bits_kernel(words, key, first, n, keep, PURPOSE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """words[j, 4 i + m] = word m of draw first + i for nonzero j; with KEPT, the mask of the dropout instead."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1).to(tl.int64)
    if KEPT:
        w0 = (i * 0).to(tl.uint32)
        w1, w2, w3 = w0, w0, w0
        for level in range(16):
            f0, f1, f2, f3 = _draw(key, first + i, PURPOSE, level)
            digit = ((keep >> level) & 1) == 1
            w0 = tl.where(digit, f0 | w0, f0 & w0)
            w1 = tl.where(digit, f1 | w1, f1 & w1)
            w2 = tl.where(digit, f2 | w2, f2 & w2)
            w3 = tl.where(digit, f3 | w3, f3 & w3)
    else:
        w0, w1, w2, w3 = _draw(key, first + i, PURPOSE, j.to(tl.uint32))
    to = words + (j * n + i) * 4
    tl.store(to, w0.to(tl.int32, bitcast=True), mask=i < n)
    tl.store(to + 1, w1.to(tl.int32, bitcast=True), mask=i < n)
    tl.store(to + 2, w2.to(tl.int32, bitcast=True), mask=i < n)
    tl.store(to + 3, w3.to(tl.int32, bitcast=True), mask=i < n)


@triton.jit
def places_kernel(
    places, key, first, n, groups, GROUP: tl.constexpr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr
):
    """places[j, t] = shift + low of tile first + t for nonzero j."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1).to(tl.int64)
    w0, w1, _, _ = _draw(key, first + t, PURPOSE, j.to(tl.uint32))
    shift = ((w0.to(tl.int64) * groups) >> 32) * GROUP
    tl.store(places + j * n + t, (shift + (w1 & (GROUP - 1)).to(tl.int64)).to(tl.int32), mask=t < n)


@triton.jit
def _bit(words, at):
    return (tl.load(words + (at >> 5)) >> (at & 31).to(tl.int32)) & 1


@triton.jit
def gather_kernel(
    x,  # [rows, n], rows stride_x apart
    partial,  # float32 [rows, parts, dim], added to
    signs,  # int32 [nonzeros, 4 draws], from coordinate `first_bit` on
    keeps,  # int32 [4 draws]
    places,  # int32 [nonzeros, tiles]
    n,
    stride_x,
    column,  # of the first tile's first coordinate; negative where the call begins inside that tile
    phase,  # bits before that coordinate
    dim,
    width,
    draws,
    tiles,
    parts,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
    SINGLE: tl.constexpr,  # one nonzero
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    mine = c < dim
    if SINGLE:
        b, sign_of, place_of = c, signs, places
    else:
        j = (tl.where(mine, c, 0) // width).to(tl.int64)  # signs beyond the last nonzero's are not ours
        b = c % width
        sign_of, place_of = signs + j * draws * 4, places + j * tiles
    x_row = x + row * stride_x
    acc = tl.zeros((BLOCK,), tl.float32)
    for t in range(tiles * part // parts, tiles * (part + 1) // parts):
        # What is 64 bits wide is the tile's; within the tile 32 bits do.
        start, bits = column + t * width, phase + t * width
        low = tl.maximum(-start, 0).to(tl.int32)
        high = tl.minimum(n - start, width).to(tl.int32)
        word, rest = bits >> 5, (bits & 31).to(tl.int32)
        if SINGLE:
            place = tl.load(place_of + t)
        else:
            place = tl.load(place_of + t, mask=mine, other=0)
        i = (b ^ (place & (GROUP - 1))) - (place & ~(GROUP - 1))
        i = tl.where(i < 0, i + width, i)
        inside = mine & (i >= low) & (i < high)
        bit = tl.where(mine, rest + i, 0)
        if KEEP:
            inside = inside & (_bit(keeps + word, bit) == 1)
        value = tl.load(x_row + start + i, mask=inside, other=0.0).to(tl.float32)
        acc += tl.where(_bit(sign_of + word, bit) == 1, -value, value)
    to = partial + (row * parts + part) * dim + c
    tl.store(to, tl.load(to, mask=mine, other=0.0) + acc, mask=mine)


@triton.jit
def add_kernel(partial, y, scale, dim, parts, stride_y, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """y[row] += scale * the sum of the row's parts, in one order."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, q = tl.program_id(1).to(tl.int64), tl.arange(0, PARTS)
    acc = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        known = ((first + q) < parts)[:, None] & (c < dim)[None, :]
        at = (row * parts + first + q.to(tl.int64))[:, None] * dim + c[None, :]
        acc += tl.load(partial + at, mask=known, other=0.0)
    to = y + row * stride_y + c
    tl.store(to, tl.load(to, mask=c < dim, other=0.0) + scale * tl.sum(acc, 0), mask=c < dim)


@triton.jit
def spread_kernel(
    x,  # float32 [rows, n], written
    y,  # float32 [rows, dim]
    signs,
    keeps,
    places,
    stride_x,
    stride_y,
    begin,  # columns of the window
    end,
    column,
    phase,
    scale,
    width,
    nnz,
    draws,
    tiles,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[row, p] = scale * the signed sum of p's buckets."""
    at_column = begin + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mine = at_column < end
    at = tl.where(mine, at_column - column, 0)
    tile, i = at // width, (at % width).to(tl.int32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(nnz):
        wide = tl.full((), 1, tl.int64) * j
        place = tl.load(places + (wide * tiles + tile))
        turned = i + (place & ~(GROUP - 1))
        turned = tl.where(turned >= width, turned - width, turned) ^ (place & (GROUP - 1))
        value = tl.load(y + row * stride_y + (wide * width + turned))
        acc += tl.where(_bit(signs + wide * draws * 4, phase + at) == 1, -value, value)
    if KEEP:
        acc = tl.where(_bit(keeps, phase + at) == 1, acc, 0.0)
    tl.store(x + row * stride_x + at_column, scale * acc, mask=mine)


class Window:
    """The draws of the tiles that hold coordinates [begin, end)."""

    def __init__(self, spec: ProjectionSpec, begin: int, end: int, device: torch.device) -> None:
        first_tile, last_tile = begin // spec.width, (end - 1) // spec.width
        self.start, self.tiles = first_tile * spec.width, last_tile - first_tile + 1
        first_draw = self.start // 128
        self.phase = self.start - first_draw * 128
        self.draws = ((last_tile + 1) * spec.width - 1) // 128 - first_draw + 1
        key = spec.key[0] | spec.key[1] << 32
        key = key - (1 << 64) if key >> 63 else key
        make = lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)  # noqa: E731
        self.signs, self.places = make(spec.nnz, 4 * self.draws), make(spec.nnz, self.tiles)
        self.keeps = make(4 * self.draws) if spec.keep_count < KEEP_ALL else self.signs
        blocks = triton.cdiv(self.draws, DRAW_BLOCK)
        with _gpu.on(self.signs):
            bits_kernel[(blocks, spec.nnz)](
                self.signs, key, first_draw, self.draws, 0, PURPOSE=PROJECT_SIGN, KEPT=False, BLOCK=DRAW_BLOCK
            )
            if spec.keep_count < KEEP_ALL:
                bits_kernel[(blocks, 1)](
                    self.keeps, key, first_draw, self.draws, spec.keep_count, PURPOSE=PROJECT_KEEP, KEPT=True,
                    BLOCK=DRAW_BLOCK,
                )  # fmt: skip
            places_kernel[(triton.cdiv(self.tiles, DRAW_BLOCK), spec.nnz)](
                self.places, key, first_tile, self.tiles, spec.width // spec.group, GROUP=spec.group,
                PURPOSE=PROJECT_TILE, BLOCK=DRAW_BLOCK,
            )  # fmt: skip


def _windows(spec: ProjectionSpec, offset: int, n: int) -> list[tuple[int, int]]:
    """Coordinate ranges that end with a tile, except the last."""
    step = max(1, WINDOW // spec.nnz // spec.width) * spec.width
    cuts = [offset, *range((offset // step + 1) * step, offset + n, step), offset + n]
    return list(zip(cuts, cuts[1:]))


def gather_block(nnz: int) -> int:
    """Buckets of a program; with several nonzeros every bucket has table addresses of its own, in registers."""
    return 2048 if nnz == 1 else 1024


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T`` for rows with contiguous columns; bits depend on the sizes and the offset of the call alone."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    block = gather_block(spec.nnz)
    blocks = triton.cdiv(spec.dim, block)
    parts = max(1, min(_PROGRAMS // blocks, n // spec.width // _TILES_PER_PART))
    group = max(1, min(rows, 65535, _WORKSPACE // (parts * spec.dim * 4)))
    with _gpu.on(x):
        for row in range(0, rows, group):
            some, y = x[row : row + group], out[row : row + group]
            partial = torch.zeros(some.shape[0], parts, spec.dim, dtype=torch.float32, device=x.device)
            for begin, end in _windows(spec, offset, n):
                window = Window(spec, begin, end, x.device)
                gather_kernel[(blocks, parts, some.shape[0])](
                    some, partial, window.signs, window.keeps, window.places, n, some.stride(0), window.start - offset,
                    window.phase, spec.dim, spec.width, window.draws, window.tiles, parts, GROUP=spec.group,
                    KEEP=spec.keep_count < KEEP_ALL, SINGLE=spec.nnz == 1, BLOCK=block, num_warps=4,
                )  # fmt: skip
            add_kernel[(triton.cdiv(spec.dim, ADD_COLUMNS), some.shape[0])](
                partial, y, spec.scale, spec.dim, parts, y.stride(0), PARTS=ADD_PARTS, COLUMNS=ADD_COLUMNS,
                num_warps=4,
            )  # fmt: skip


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out = y S``, out [B, n]."""
    rows, n = out.shape
    if rows == 0 or n == 0:
        return
    with _gpu.on(y):
        for begin, end in _windows(spec, offset, n):
            window = Window(spec, begin, end, y.device)
            for row in range(0, rows, 65535):
                some, to = y[row : row + 65535], out[row : row + 65535]
                spread_kernel[(triton.cdiv(end - begin, SPREAD_BLOCK), some.shape[0])](
                    to, some, window.signs, window.keeps, window.places, to.stride(0), some.stride(0),
                    begin - offset, end - offset, window.start - offset, window.phase, spec.scale, spec.width,
                    spec.nnz, window.draws, window.tiles, GROUP=spec.group, KEEP=spec.keep_count < KEEP_ALL,
                    BLOCK=SPREAD_BLOCK, num_warps=4,
                )  # fmt: skip
