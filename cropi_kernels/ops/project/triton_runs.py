"""CountSketch and SJLT in Triton by runs of 16 bytes, where tiles are made of whole groups of 16 coordinates.

A run of coordinates stays a run of buckets (docs/project.md): the rotation and the upper bits of the XOR are in the
address of one load, the lower bits exchange registers of one thread, and the signs of a run are one byte. So a program
has about seven instructions for a half-width number, where it has one load, one sign and one bucket for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exchanged(words, first, second, RUNS: tl.constexpr):
    """[RUNS, 4]: word w of a run from its word w ^ (first + 2 second)."""
    a, b = tl.split(tl.reshape(words, [RUNS, 2, 2]))  # even and odd words
    a, b = tl.where(first, b, a), tl.where(first, a, b)
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    a0, a1 = tl.where(second, a1, a0), tl.where(second, a0, a1)
    b0, b1 = tl.where(second, b1, b0), tl.where(second, b0, b1)
    return tl.reshape(tl.join(tl.join(a0, a1), tl.join(b0, b1)), [RUNS, 4])


@triton.jit
def _bits(table, first_byte, run, RUN: tl.constexpr):
    """The RUN bits of a run, in the low bits; ``first_byte`` is that of run 0."""
    if RUN == 8:
        bits = tl.load(table + first_byte + run).to(tl.uint32)
    else:
        bits = tl.load(table + first_byte + (run >> 1)).to(tl.uint32) >> ((run & 1) * 4).to(tl.uint32)
    return bits[:, None]


@triton.jit
def _raw(x, inside, BITS: tl.constexpr):
    value = tl.load(x, mask=inside, other=0.0)
    if BITS == 16:
        word = value.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        word = value.to(tl.uint32, bitcast=True)
    return word


@triton.jit
def _words(
    x_row,
    start,  # of the tile in the row
    source,
    word,
    mine,
    n,
    width,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """[RUNS, 4]: the words of the runs ``source`` of a tile, 0 where the row ends."""
    RUN: tl.constexpr = 128 // BITS
    HALVES: tl.constexpr = 32 // BITS
    words = tl.zeros((RUNS, 4), tl.uint32)
    if ALIGNED and (start >= 0) & (start + width <= n):
        whole = tl.multiple_of((x_row + start).to(tl.pointer_type(tl.uint32)), 16)
        if EVEN:
            words = tl.load(whole + (source[:, None] * 4 + word))
        else:
            words = tl.load(whole + (source[:, None] * 4 + word), mask=mine[:, None], other=0)
    else:
        at = source[:, None] * RUN + word * HALVES
        floor, top = tl.maximum(-start, 0).to(tl.int32), tl.minimum(n - start, width).to(tl.int32)
        words = _raw(x_row + start + at, mine[:, None] & (at >= floor) & (at < top), BITS)
        if HALVES == 2:
            at += 1
            words |= _raw(x_row + start + at, mine[:, None] & (at >= floor) & (at < top), BITS) << 16
    return words


@triton.jit
def _signed(words, sign, word, HALVES: tl.constexpr):
    """Words whose numbers are negated where the bits of ``sign`` are set."""
    if HALVES == 2:
        # Bits 2w and 2w + 1, where they meet the sign bits of word w's halves after a shift.
        words ^= ((sign | sign << 15) << (15 - 2 * word).to(tl.uint32)) & 0x80008000
    else:
        words ^= (sign << (31 - word).to(tl.uint32)) & 0x80000000
    return words


@triton.jit
def _kept(words, kept, word, HALVES: tl.constexpr):
    """Words whose numbers are 0 where the bits of ``kept`` are not set."""
    if HALVES == 2:
        words &= (((kept | kept << 15) >> (2 * word).to(tl.uint32)) & 0x00010001) * 0xFFFF
    else:
        words = tl.where(((kept >> word.to(tl.uint32)) & 1) == 1, words, 0)
    return words


@triton.jit(do_not_specialize=["n", "column", "phase", "draws", "tiles", "parts", "blocks", "first"])
def gather_runs_kernel(
    x,  # [rows, n], rows stride_x apart
    partial,  # float32 [rows, parts, dim], added to
    signs,  # int32 [nonzeros, 4 draws], from `phase` bits before the first tile on
    keeps,  # int32 [4 draws]
    places,  # int32 [nonzeros, tiles]
    stride_x,
    dim,
    width,
    n,
    column,  # of the first tile's first coordinate; negative where the call begins inside that tile
    phase,  # bits before that coordinate
    draws,
    tiles,
    parts,
    blocks,  # of a nonzero
    first,  # 1: `partial` holds nothing yet
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row's first run begins at a multiple of 16 bytes
    EVEN: tl.constexpr,  # every block is full
    RUNS: tl.constexpr,
):
    """partial[row, part] (+)= the sums of the part's tiles in the buckets of RUNS runs of one nonzero."""
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = 128 // BITS
    HALVES: tl.constexpr = 32 // BITS
    block = tl.program_id(0)
    part, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j = (block // blocks).to(tl.int64)
    run = (block % blocks) * RUNS + tl.arange(0, RUNS)
    word = tl.arange(0, 4)[None, :]
    runs = width // RUN
    mine = run < runs
    sign_of = signs.to(tl.pointer_type(tl.uint8)) + j * draws * 16
    keep_of = keeps.to(tl.pointer_type(tl.uint8))
    place_of = places + j * tiles
    x_row = x + row * stride_x
    low_half = tl.zeros((RUNS, 4), tl.float32)  # all of it for float32
    high_half = tl.zeros((RUNS, 4), tl.float32)
    begin, end = tiles * part // parts, tiles * (part + 1) // parts
    next_place = tl.load(place_of + begin, mask=begin < end, other=0)
    for t in range(begin, end):
        place = next_place
        next_place = tl.load(place_of + tl.minimum(t + 1, tiles - 1))
        low, shift = place & 15, place >> 4
        # Where a tile begins takes 64 bits; places within it take 32.
        start, byte = column + t * width, (phase + t * width) >> 3
        source = (run ^ (low // RUN)) - shift * (16 // RUN)
        source = tl.where(source < 0, source + runs, source)
        if not EVEN:
            source = tl.where(mine, source, 0)
        words = _words(x_row, start, source, word, mine, n, width, ALIGNED, EVEN, BITS, RUNS)
        words = _signed(words, _bits(sign_of, byte, source, RUN), word, HALVES)
        if KEEP:
            words = _kept(words, _bits(keep_of, byte, source, RUN), word, HALVES)
        if HALVES == 2:
            words = _exchanged(words, (low & 2) != 0, (low & 4) != 0, RUNS)
            words = tl.where((low & 1) != 0, words >> 16 | words << 16, words)
            if x.dtype.element_ty == tl.bfloat16:
                low_half += (words << 16).to(tl.float32, bitcast=True)
                high_half += (words & 0xFFFF0000).to(tl.float32, bitcast=True)
            else:
                low_half += (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                high_half += (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            words = _exchanged(words, (low & 1) != 0, (low & 2) != 0, RUNS)
            low_half += words.to(tl.float32, bitcast=True)
    to = partial + (row * parts + part) * dim + j * width
    if HALVES == 2:
        sums = tl.join(low_half, high_half)
        known, half = mine[:, None, None], tl.arange(0, 2)[None, None, :]
        to += run[:, None, None] * 8 + word[:, :, None] * 2 + half
    else:
        sums, known = low_half, mine[:, None]
        to += run[:, None] * 4 + word
    tl.store(to, sums + tl.load(to, mask=known & (first == 0), other=0.0), mask=known)


@triton.jit(do_not_specialize=["nnz", "begin", "end", "column", "phase", "draws", "tiles"])
def spread_runs_kernel(
    x,  # float32 [rows, n], written
    y,  # float32 [rows, dim]
    signs,
    keeps,
    places,
    stride_x,
    stride_y,
    width,
    nnz,
    begin,  # coordinates of the window, counted from its first tile
    end,
    column,
    phase,
    draws,
    tiles,
    scale,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row's first run begins at a multiple of 16 bytes
    SINGLE: tl.constexpr,  # one nonzero
    RUNS: tl.constexpr,
):
    """x[row, p] = scale * the signed sum of p's buckets, four coordinates at a time."""
    block = begin // 4 + tl.program_id(0) * RUNS
    row = tl.program_id(1).to(tl.int64)
    word = tl.arange(0, 4)[None, :]
    at = (block + tl.arange(0, RUNS))[:, None] * 4 + word
    run = tl.minimum(block + tl.arange(0, RUNS), (end - 1) // 4)  # those beyond have nothing to read
    tile, i = run * 4 // width, run * 4 % width
    sign_of, keep_of = signs.to(tl.pointer_type(tl.uint8)), keeps.to(tl.pointer_type(tl.uint8))
    sums = tl.zeros((RUNS, 4), tl.float32)
    for j in range(nnz):
        wide = tl.full((), 1, tl.int64) * j
        place = tl.load(places + (wide * tiles + tile))
        turned = i + (place & ~15)
        turned = tl.where(turned >= width, turned - width, turned) ^ (place & 12)
        buckets = tl.multiple_of(y + row * stride_y + wide * width, 16)
        words = tl.load(buckets + (turned >> 2)[:, None] * 4 + word).to(tl.uint32, bitcast=True)
        words = _exchanged(words, ((place & 1) != 0)[:, None], (place & 2) != 0, RUNS)
        sign = _bits(sign_of, (phase >> 3) + wide * draws * 16, run, 4)
        values = _signed(words, sign, word, 1).to(tl.float32, bitcast=True)
        sums = values if SINGLE else tl.where(j == 0, values, sums + values)
    sums *= scale
    if KEEP:
        sums = tl.where(((_bits(keep_of, phase >> 3, run, 4) >> word.to(tl.uint32)) & 1) == 1, sums, 0.0)
    to = x + row * stride_x + column
    if ALIGNED:
        to = tl.multiple_of(to, 16)
    if (block * 4 >= begin) & ((block + RUNS) * 4 <= end):  # whole: four numbers a store
        tl.store(to + at, sums)
    else:
        tl.store(to + at, sums, mask=(at >= begin) & (at < end))
