"""`slab_turns_kernel` of 256 columns whose tiles of A stay in shared memory over all pairs of a column block.

A pair's column XOR is not in the addresses of A but in the accumulator: a thread holds the columns that differ by
multiples of 8 in its own registers, so that where the pair changes, an XOR of columns is an exchange of registers. So
tiles of A are brought once for many pairs, and what a program takes from the L2 a step is a tile of D: a third.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._gluon import load_by_threads
from .triton_turns import (
    GROUPS,
    WARPS,
    _barriers,
    _bits_of_columns,
    _block_of,
    _chunk_of,
    _columns_of,
    _matrix_of,
    _pieces_of_16_bytes,
    _row_flips,
    _share_of,
    _target_of,
)

NO_COLUMN_XOR = gl.constexpr(~(0xFFFF << 16))  # of a pair's word


@gluon.jit
def _exchanged(acc, by, layout: gl.constexpr, APART: gl.constexpr):
    """``acc[:, j ^ (by & APART)]``: a thread has both columns."""
    PAIRS: gl.constexpr = acc.shape[1] // (2 * APART)
    low, high = acc.reshape((acc.shape[0], PAIRS, 2, APART)).permute((0, 1, 3, 2)).split()
    other = (by & APART) != 0
    both = gl.join(gl.where(other, high, low), gl.where(other, low, high))
    acc = both.permute((0, 1, 3, 2)).reshape((acc.shape[0], acc.shape[1]))
    return gl.convert_layout(acc, layout, assert_trivial=True)


@gluon.jit
def _bring(
    d_0,
    d_1,
    d_2,
    a,
    pairs,
    d_tiles,
    a_tiles,
    ready,
    empty,
    rows_0,
    rows_1,
    rows_2,
    stride_0,
    stride_1,
    stride_2,
    cols,
    stride_a,
    begin_1,
    begin_2,
    begin,
    n_pairs,
    t0,
    length,
    ALONE: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STAY: gl.constexpr,
):
    SLAB_ROWS: gl.constexpr = GROUPS * ROWS
    SPAN: gl.constexpr = STAY * BK
    of_d: gl.constexpr = _pieces_of_16_bytes(ROWS)
    of_a: gl.constexpr = _pieces_of_16_bytes(COLS)
    d_token = gl.arange(0, BK, layout=gl.SliceLayout(1, of_d))
    a_token = gl.arange(0, BK, layout=gl.SliceLayout(1, of_a))
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(0, of_d))
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, of_a))
    a_place = a_token.to(gl.int64)[:, None] * stride_a
    step, a_first, a_next = 0, 0, 0
    word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
    for first in range(0, length, SPAN):
        steps = gl.cdiv(gl.minimum(SPAN, length - first), BK)
        before = ~word
        for p in range(0, n_pairs):
            # On its way while this pair is copied.
            after = gl.load(pairs + begin + gl.where(p + 1 < n_pairs, p + 1, 0))
            fresh = (word ^ before) >> 32 & 0xFFFF != 0
            if fresh:
                a_first = a_next
                a_next += steps
            block, c = _block_of(word), _columns_of(word & NO_COLUMN_XOR, j, COLS)
            d, rows, stride_d, block = _matrix_of(
                block, d_0, d_1, d_2, rows_0, rows_1, rows_2, stride_0, stride_1, stride_2, begin_1, begin_2, ALONE
            )  # fmt: skip
            first_row = block * SLAB_ROWS
            d_place = d_token.to(gl.int64)[:, None] * stride_d
            for k in range(0, steps):
                t = first + k * BK
                stage = step % STAGES
                # The wait for a phase before the first returns at once.
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                for group in gl.static_range(GROUPS):
                    r = first_row + ((group * ROWS + i) ^ (word & 0xFFFF).to(gl.int32))
                    r = gl.max_contiguous(gl.multiple_of(r, 8), 8)
                    load_by_threads(
                        d_tiles.index(stage * GROUPS + group),
                        d + (t0 + t) * stride_d + (d_place + r[None, :]),
                        mask=(d_token < length - t)[:, None] & (r < rows)[None, :],
                    )
                if fresh:
                    load_by_threads(
                        a_tiles.index((a_first + k) % STAY),
                        a + (t0 + t) * stride_a + (a_place + c[None, :]),
                        mask=(a_token < length - t)[:, None] & (c < cols)[None, :],
                    )
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                step += 1
            before = word
            word = after


@gluon.jit
def _multiply(
    d_tiles,
    a_tiles,
    ready,
    empty,
    target,
    add,  # whether to what is there
    pairs,
    row_sign,
    flips,
    padded_rows,
    begin,
    n_pairs,
    length,
    GROUP: gl.constexpr,
    COLUMN_SIGNS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STAY: gl.constexpr,
):
    SLAB_ROWS: gl.constexpr = GROUPS * ROWS
    SPAN: gl.constexpr = STAY * BK
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    of_bits: gl.constexpr = _bits_of_columns(COLS)
    i = GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, products))
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, products))
    low = gl.arange(0, 8, layout=gl.SliceLayout(0, of_bits))
    high = gl.arange(0, COLS // 8, layout=gl.SliceLayout(1, of_bits))
    acc = gl.zeros((ROWS, COLS), gl.float32, layout=products)
    step, a_first, a_next = 0, 0, 0
    word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
    for first in range(0, length, SPAN):
        steps = gl.cdiv(gl.minimum(SPAN, length - first), BK)
        before = ~word
        for p in range(0, n_pairs):
            then = gl.where(p + 1 < n_pairs, p + 1, 0)
            more = (then > 0) | (first + SPAN < length)
            after = gl.load(pairs + begin + then)
            if (word ^ before) >> 32 & 0xFFFF != 0:
                a_first = a_next
                a_next += steps
            for k in range(0, steps):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                # The copies write through another proxy than the products read through.
                fence_async_shared()
                d = d_tiles.index(stage * GROUPS + GROUP).permute((1, 0))
                acc = warpgroup_mma(d, a_tiles.index((a_first + k) % STAY), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if k > 0:  # the step before has ended
                    mbarrier.arrive(empty.index((step - 1) % STAGES))
                step += 1
            flip = _row_flips(row_sign, word, after, more, i, padded_rows, SLAB_ROWS)[:, None]
            here = (word >> 16 & 0xFFFF).to(gl.int32)
            there = gl.where(more, (after >> 16 & 0xFFFF).to(gl.int32), 0)
            if COLUMN_SIGNS:
                bits = gl.load(flips + (begin + p) * 8 + low)
                bits ^= gl.load(flips + (begin + then) * 8 + low, mask=(low >= 0) & more, other=0)
                of_columns = (bits[None, :] >> (high ^ (here >> 3))[:, None] << 31).reshape((COLS,))
                flip = flip ^ gl.convert_layout(of_columns, gl.SliceLayout(0, products))[None, :]
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step - 1) % STAGES))
            acc = (acc.to(gl.int32, bitcast=True) ^ flip).to(gl.float32, bitcast=True)
            for bit in gl.static_range(3, 8):
                acc = _exchanged(acc, here ^ there, products, 1 << bit)
            before = word
            word = after
    place = target + i[:, None] * COLS + j[None, :]
    gl.store(place, gl.load(place, mask=(j >= 0)[None, :] & (i >= 0)[:, None] & add, other=0.0) + acc)


@gluon.jit(
    do_not_specialize=["begin_1", "begin_2", "n_segments", "n_slabs", "groups", "group_pairs", "out_groups"]
)
def slab_stay_kernel(
    d_0,  # all are those of `slab_kernel`; a slab's pairs are sorted by column block
    d_1,
    d_2,
    a,
    out,
    partial,
    table,
    pairs,
    first,
    row_sign,
    flips,
    rows_0,
    rows_1,
    rows_2,
    stride_0,
    stride_1,
    stride_2,
    cols,
    stride_a,
    padded_rows,
    begin_1,
    begin_2,
    n_segments,
    n_slabs,
    groups,
    group_pairs,
    out_groups,
    SLAB_ROWS: gl.constexpr,
    SLAB_COLS: gl.constexpr,
    COLUMN_SIGNS: gl.constexpr,
    ALONE: gl.constexpr,
    INTO: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STAY: gl.constexpr,
    OF_SECOND: gl.constexpr,
    OF_COPIES: gl.constexpr,
):
    """STAY: tiles of A that stay, at least STAGES. They go round: a place is written STAY steps after it was read last,
    and ``empty`` has told of all steps but the latest STAGES."""
    ROWS: gl.constexpr = SLAB_ROWS // GROUPS
    SLAB: gl.constexpr = SLAB_ROWS * SLAB_COLS
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pid = gl.program_id(0).to(gl.int64)
    group = (pid % groups).to(gl.int32)
    slab = pid // groups % n_slabs
    segment, t0, t1, slot = _chunk_of(table, pid // groups // n_slabs)
    if segment < n_segments:
        begin, n_pairs = _share_of(first, slab, group, group_pairs)
        length = (t1 - t0).to(gl.int32)
        target, add = _target_of(out, partial, segment, slot, group, slab, n_slabs, out_groups, INTO, SLAB)
        d_tiles = gl.allocate_shared_memory(d_0.dtype.element_ty, [STAGES * GROUPS, BK, ROWS], layout)
        a_tiles = gl.allocate_shared_memory(a.dtype.element_ty, [STAY, BK, SLAB_COLS], layout)
        ready, empty = _barriers(STAGES)
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        d_tiles, a_tiles, ready, empty, target, add, pairs, row_sign, flips, padded_rows, begin,
                        n_pairs, length, 0, COLUMN_SIGNS, ROWS, SLAB_COLS, BK, STAGES, STAY,
                    ),
                ),
                (
                    _multiply,
                    (
                        d_tiles, a_tiles, ready, empty, target, add, pairs, row_sign, flips, padded_rows, begin,
                        n_pairs, length, 1, COLUMN_SIGNS, ROWS, SLAB_COLS, BK, STAGES, STAY,
                    ),
                ),
                (
                    _bring,
                    (
                        d_0, d_1, d_2, a, pairs, d_tiles, a_tiles, ready, empty, rows_0, rows_1, rows_2, stride_0,
                        stride_1, stride_2, cols, stride_a, begin_1, begin_2, begin, n_pairs, t0, length, ALONE,
                        ROWS, SLAB_COLS, BK, STAGES, STAY,
                    ),
                ),
            ],
            [WARPS, WARPS],
            [OF_SECOND, OF_COPIES],
        )  # fmt: skip
