"""CountSketch and SJLT of rows in Triton, for GPUs without the CUDA C++ build.

A program owns a block of buckets and gathers the coordinates that land there, tile after tile: sums in registers, no
atomics. Triton has no way to share one draw among 128 elements, so signs, kept coordinates and tile places of a window
of coordinates are drawn into memory first (at most 32 MB, most of it in the second-level cache). Where the tiles are
made of whole groups of 16 coordinates, `triton_runs` takes them by runs of 16 bytes; what is here takes single ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ... import _gpu
from ..._launch import OPTIONS, Launch
from .spec import KEEP_ALL, ProjectionSpec
from .triton_draws import Window
from .triton_runs import gather_runs_kernel, spread_runs_kernel

# Coordinates times bits of each (signs and the dropout's) whose draws are in memory at once. On an H200, a row of 1e9
# numbers in bfloat16 takes 0.62 ms, and 0.79 with 2^27.
WINDOW = 1 << 28
SPREAD_BLOCK = 512
RUNS, SPREAD_RUNS = 512, 512  # of a program
GATHER_WARPS = 8  # of a program of RUNS: two runs for each thread
ADD_PARTS, ADD_COLUMNS = 32, 64
_PROGRAMS = 1024  # per row; from the sizes alone, as the bits are
# Of a row, by runs: those of five programs for each of the 132 multiprocessors of an H100, all at once; of four where
# the numbers have 32 bits (1.11 ms for 1e9 of them, and 1.38 with five).
_SUMS, _WIDE_SUMS = 660 * 4096, 528 * 4096
_TILES_PER_PART = 8
_GRID_Y = 65535  # the most programs of a launch along its second and third axis
_WORKSPACE = 32 << 20


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
    first,  # 1: `partial` holds nothing yet
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
    tl.store(to, tl.load(to, mask=mine & (first == 0), other=0.0) + acc, mask=mine)


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
    begin,  # coordinates of the window, counted from its first tile
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
    at = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mine = at < end
    tile, i = tl.where(mine, at, 0) // width, tl.where(mine, at, 0) % width
    bit = phase + tl.where(mine, at, 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(nnz):
        wide = tl.full((), 1, tl.int64) * j
        place = tl.load(places + (wide * tiles + tile))
        turned = i + (place & ~(GROUP - 1))
        turned = tl.where(turned >= width, turned - width, turned) ^ (place & (GROUP - 1))
        value = tl.load(y + row * stride_y + (wide * width + turned))
        acc += tl.where(_bit(signs + wide * draws * 4, bit) == 1, -value, value)
    if KEEP:
        acc = tl.where(_bit(keeps, bit) == 1, acc, 0.0)
    tl.store(x + row * stride_x + column + at, scale * acc, mask=mine)


def _windows(spec: ProjectionSpec, offset: int, n: int) -> list[tuple[int, int]]:
    """Coordinate ranges that end with a tile, except the last."""
    bits = spec.nnz + (spec.keep_count < KEEP_ALL)
    step = max(1, WINDOW // bits // spec.width) * spec.width
    cuts = [offset, *range((offset // step + 1) * step, offset + n, step), offset + n]
    return list(zip(cuts, cuts[1:]))


def gather_block(nnz: int) -> int:
    """Buckets of a program; with several nonzeros every bucket has table addresses of its own, in registers."""
    return 2048 if nnz == 1 else 1024


def _aligned(x: torch.Tensor, offset: int) -> bool:
    """Whether coordinate 0 of every row lies, or would lie, at a multiple of 16 bytes."""
    size = x.element_size()
    return (x.data_ptr() - offset * size) % 16 == 0 and (x.shape[0] == 1 or x.stride(0) * size % 16 == 0)


def _stride(x: torch.Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0  # a single row has none to compile a kernel for


def run_block(runs: int) -> int:
    """Runs of a program, of a tile that has so many: as few as may be beyond the tile's, then as many as can be."""
    return min((RUNS, RUNS // 2, RUNS // 4), key=lambda block: (triton.cdiv(runs, block) * block, -block))


@functools.cache
def _gather_runs(keep: bool, aligned: bool, even: bool, runs: int) -> Launch:
    constants = {"KEEP": keep, "ALIGNED": aligned, "EVEN": even, "RUNS": runs}
    return Launch(gather_runs_kernel, **constants, num_warps=GATHER_WARPS * runs // RUNS)


@functools.cache
def _spread_runs(keep: bool, aligned: bool, single: bool) -> Launch:
    return Launch(
        spread_runs_kernel, KEEP=keep, ALIGNED=aligned, SINGLE=single, RUNS=SPREAD_RUNS, num_warps=4
    )


def _gather_by_runs(x: torch.Tensor, spec: ProjectionSpec, offset: int) -> Callable[..., None]:
    runs = spec.width * x.element_size() // 16
    block = run_block(runs)
    blocks = triton.cdiv(runs, block)
    launch = _gather_runs(spec.keep_count < KEEP_ALL, _aligned(x, offset), runs % block == 0, block)

    def gather(some: torch.Tensor, partial: torch.Tensor, window: Window, first: bool) -> None:
        rows, parts, dim = partial.shape
        launch(
            (blocks * spec.nnz, parts, rows),
            (some, partial, window.signs, window.keeps, window.places),
            (_stride(some), dim, spec.width),
            (
                some.shape[1], window.start - offset, window.phase, window.draws, window.tiles, parts, blocks,
                int(first),
            ),
        )  # fmt: skip

    return gather


def _gather_one_by_one(x: torch.Tensor, spec: ProjectionSpec, offset: int) -> Callable[..., None]:
    block = gather_block(spec.nnz)

    def gather(some: torch.Tensor, partial: torch.Tensor, window: Window, first: bool) -> None:
        rows, parts, dim = partial.shape
        with _gpu.on(some):
            gather_kernel[(triton.cdiv(dim, block), parts, rows)](
                some, partial, window.signs, window.keeps, window.places, some.shape[1], some.stride(0),
                window.start - offset, window.phase, dim, spec.width, window.draws, window.tiles, parts, int(first),
                GROUP=spec.group, KEEP=spec.keep_count < KEEP_ALL, SINGLE=spec.nnz == 1, BLOCK=block, num_warps=4,
                **OPTIONS,
            )  # fmt: skip

    return gather


def _parts(spec: ProjectionSpec, n: int, itemsize: int) -> int:
    """Partial sums of a row: from the sizes alone, as the bits are."""
    at_once = (_SUMS if itemsize < 4 else _WIDE_SUMS) // spec.dim
    if spec.group < 16:
        at_once = _PROGRAMS // triton.cdiv(spec.dim, gather_block(spec.nnz))
    return max(1, min(at_once, n // spec.width // _TILES_PER_PART, _GRID_Y))


def project(x: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out += x S^T`` for rows with contiguous columns; bits depend on the sizes and the offset of the call alone."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    parts = _parts(spec, n, x.element_size())
    group = max(1, min(rows, _GRID_Y, _WORKSPACE // (parts * spec.dim * 4)))
    gather = (_gather_by_runs if spec.group == 16 else _gather_one_by_one)(x, spec, offset)
    for row in range(0, rows, group):
        some, y = x[row : row + group], out[row : row + group]
        partial = torch.empty(some.shape[0], parts, spec.dim, dtype=torch.float32, device=x.device)
        for begin, end in _windows(spec, offset, n):
            gather(some, partial, Window(spec, begin, end, x.device), begin == offset)
        with _gpu.on(x):
            add_kernel[(triton.cdiv(spec.dim, ADD_COLUMNS), some.shape[0])](
                partial, y, spec.scale, spec.dim, parts, y.stride(0), PARTS=ADD_PARTS, COLUMNS=ADD_COLUMNS,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
        del partial  # before the next rows' are made


def transpose(y: torch.Tensor, spec: ProjectionSpec, out: torch.Tensor, offset: int) -> None:
    """``out = y S``, out [B, n]."""
    rows, n = out.shape
    if rows == 0 or n == 0:
        return
    keep, by_runs = spec.keep_count < KEEP_ALL, spec.group == 16
    if by_runs and y.data_ptr() % 16:
        y = y.clone()
    for begin, end in _windows(spec, offset, n):
        window = Window(spec, begin, end, y.device)
        first, last, column = begin - window.start, end - window.start, window.start - offset
        for row in range(0, rows, _GRID_Y):
            some, to = y[row : row + _GRID_Y], out[row : row + _GRID_Y]
            if by_runs:
                runs = triton.cdiv(last, 4) - first // 4
                _spread_runs(keep, _aligned(out, offset), spec.nnz == 1)(
                    (triton.cdiv(runs, SPREAD_RUNS), some.shape[0]),
                    (to, some, window.signs, window.keeps, window.places),
                    (_stride(to), some.stride(0), spec.width),
                    (spec.nnz, first, last, column, window.phase, window.draws, window.tiles),
                    (spec.scale,),
                )
                continue
            with _gpu.on(y):
                spread_kernel[(triton.cdiv(last - first, SPREAD_BLOCK), some.shape[0])](
                    to, some, window.signs, window.keeps, window.places, to.stride(0), some.stride(0),
                    first, last, column, window.phase, spec.scale, spec.width, spec.nnz, window.draws,
                    window.tiles, GROUP=spec.group, KEEP=keep, BLOCK=SPREAD_BLOCK, num_warps=4, **OPTIONS,
                )  # fmt: skip
