"""`slab_kernel` by warps of different work: four bring operands, two groups of four multiply half of the rows each.

In `slab_kernel` the same warps copy and multiply, and wait for each other twice a step: on an H200, its tensor cores
were busy half of the time, with no other unit near its limit. Here a group waits for its operands alone (``ready``),
and the copies for a place to go to (``empty``). The bits are those of `slab_kernel`: the same sums, in the same order.

Gluon is the part of Triton in which warps are given different work (`_triton.takes_turns`).
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

from .._device_plan import what_d_is_of
from .._gluon import load_by_threads
from .._triton_pairs import block_of, columns_of, matrix_of, row_flips, share_of
from .._triton_segments import chunk_of

_chunk_of, _block_of, _columns_of, _matrix_of, _row_flips, _share_of = (
    gluon.jit(one.fn) for one in (chunk_of, block_of, columns_of, matrix_of, row_flips, share_of)
)
_what_d_is_of = gluon.constexpr_function(what_d_is_of)
GROUPS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a group: as many as share a product
THREADS = gl.constexpr(128)  # of the warps that bring


@gluon.constexpr_function
def _pieces_of_16_bytes(columns):
    """Rows of ``columns`` numbers of 16 bits, as four warps copy them."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def _bits_of_columns(columns):
    """[columns / 8, 8] numbers, which as one row lie where a product's columns do."""
    of_8 = [[1 << bit, 0] for bit in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], *of_8], lanes, [[0, 0], [0, 0]], [], [columns // 8, 8])


@gluon.jit
def _target_of(
    out, partial, segment, slot, group, slab, n_slabs, out_groups, INTO: gl.constexpr, SLAB: gl.constexpr
):
    """Where a program's sums go, and whether they are added to what is there (INTO: see `slab_kernel`)."""
    target = partial + ((slot * out_groups + group) * n_slabs + slab) * SLAB
    add = INTO == "sums"
    if INTO == "out":
        add = slot < 0
        target = gl.where(add, out + (segment * n_slabs + slab) * SLAB, target)
    return target, add


@gluon.jit
def _barriers(STAGES: gl.constexpr):
    """``ready`` and ``empty`` of every stage: arrivals of the threads that bring operands, and of the groups."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=THREADS)
        mbarrier.init(empty.index(stage), count=GROUPS)
    return ready, empty


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
    part,
    ALONE: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    HELD: gl.constexpr,
):
    SLAB_ROWS: gl.constexpr = PARTS * GROUPS * ROWS
    OF_D: gl.constexpr = _what_d_is_of(SLAB_ROWS)
    OF_ROW: gl.constexpr = OF_D & 0xFFFF if HELD else 0xFFFF
    of_d: gl.constexpr = _pieces_of_16_bytes(ROWS)
    of_a: gl.constexpr = _pieces_of_16_bytes(COLS)
    d_token = gl.arange(0, BK, layout=gl.SliceLayout(1, of_d))
    a_token = gl.arange(0, BK, layout=gl.SliceLayout(1, of_a))
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(0, of_d))
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, of_a))
    a_place = a_token.to(gl.int64)[:, None] * stride_a
    step = 0
    steps, d_step = gl.cdiv(length, BK), 0
    word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
    before = ~word
    for p in range(0, n_pairs):
        # On its way while this pair is copied.
        after = gl.load(pairs + begin + gl.minimum(p + 1, n_pairs - 1))
        fresh = (word ^ before) & OF_D != 0
        d_step += gl.where(fresh, steps, 0)
        block, c = _block_of(word), _columns_of(word, j, COLS)
        d, rows, stride_d, block = _matrix_of(
            block, d_0, d_1, d_2, rows_0, rows_1, rows_2, stride_0, stride_1, stride_2, begin_1, begin_2, ALONE
        )  # fmt: skip
        first_row = block * SLAB_ROWS
        d_place = d_token.to(gl.int64)[:, None] * stride_d
        for t in range(0, length, BK):
            stage = step % STAGES
            # The wait for a phase before the first returns at once.
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if HELD == 0 or fresh:
                d_stage = (d_step - steps + t // BK) % HELD if HELD else stage
                for group in gl.static_range(GROUPS):
                    r = first_row + (((part * GROUPS + group) * ROWS + i) ^ (word & OF_ROW).to(gl.int32))
                    r = gl.max_contiguous(gl.multiple_of(r, 8), 8)
                    load_by_threads(
                        d_tiles.index(d_stage * GROUPS + group),
                        d + (t0 + t) * stride_d + (d_place + r[None, :]),
                        mask=(d_token < length - t)[:, None] & (r < rows)[None, :],
                    )
            load_by_threads(
                a_tiles.index(stage),
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
    part,
    GROUP: gl.constexpr,
    COLUMN_SIGNS: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    HELD: gl.constexpr,
):
    SLAB_ROWS: gl.constexpr = PARTS * GROUPS * ROWS
    OF_D: gl.constexpr = _what_d_is_of(SLAB_ROWS)
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    of_bits: gl.constexpr = _bits_of_columns(COLS)
    i = (part * GROUPS + GROUP) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, products))
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, products))
    low = gl.arange(0, 8, layout=gl.SliceLayout(0, of_bits))
    high = gl.arange(0, COLS // 8, layout=gl.SliceLayout(1, of_bits))
    acc = gl.zeros((ROWS, COLS), gl.float32, layout=products)
    step = 0
    steps, d_step = gl.cdiv(length, BK), 0
    word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
    before = ~word
    for p in range(0, n_pairs):
        more = p + 1 < n_pairs
        after = gl.load(pairs + begin + gl.minimum(p + 1, n_pairs - 1))
        d_step += gl.where((word ^ before) & OF_D != 0, steps, 0)
        for t in range(0, length, BK):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            # The copies write through another proxy than the products read through.
            fence_async_shared()
            if HELD:
                d_stage = (d_step - steps + t // BK) % HELD
                d = d_tiles.index(d_stage * GROUPS + (GROUP ^ (word & ROWS != 0).to(gl.int32)))
            else:
                d = d_tiles.index(stage * GROUPS + GROUP)
            d = d.permute((1, 0))
            acc = warpgroup_mma(d, a_tiles.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if t > 0:  # the step before has ended
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        flip = _row_flips(row_sign, word, after, more, i, padded_rows, SLAB_ROWS)[:, None]
        if COLUMN_SIGNS:
            of_pair = flips + (begin + p) * 8 + low
            bits = gl.load(of_pair) ^ gl.load(of_pair + 8, mask=(low >= 0) & more, other=0)
            of_columns = (bits[None, :] >> high[:, None] << 31).reshape((COLS,))
            flip = flip ^ gl.convert_layout(of_columns, gl.SliceLayout(0, products))[None, :]
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        acc = (acc.to(gl.int32, bitcast=True) ^ flip).to(gl.float32, bitcast=True)
        before = word
        word = after
    place = target + i[:, None] * COLS + j[None, :]
    gl.store(place, gl.load(place, mask=(j >= 0)[None, :] & (i >= 0)[:, None] & add, other=0.0) + acc)


@gluon.jit(
    do_not_specialize=["begin_1", "begin_2", "n_segments", "n_slabs", "groups", "group_pairs", "out_groups"]
)
def slab_turns_kernel(
    d_0,  # all are those of `slab_kernel`
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
    PARTS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    HELD: gl.constexpr,
    OF_SECOND: gl.constexpr,
    OF_COPIES: gl.constexpr,
):
    """PARTS: of a slab, by rows, each a program's. HELD: tiles of D that stay while pairs have them in common (see
    `what_d_is_of`), at least the steps of a chunk; 0: D is brought for every pair. They go round: a place is written
    HELD steps after it was read last, and ``empty`` has told of all steps but the latest STAGES. OF_SECOND, OF_COPIES:
    registers of a thread of the second group, and of the warps that bring operands; the first group has the rest."""
    ROWS: gl.constexpr = SLAB_ROWS // GROUPS // PARTS
    SLAB: gl.constexpr = SLAB_ROWS * SLAB_COLS
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pid = gl.program_id(0).to(gl.int64)
    part = (pid % PARTS).to(gl.int32)
    group = (pid // PARTS % groups).to(gl.int32)
    slab = pid // PARTS // groups % n_slabs
    segment, t0, t1, slot = _chunk_of(table, pid // PARTS // groups // n_slabs)
    if segment < n_segments:
        begin, n_pairs = _share_of(first, slab, group, group_pairs)
        length = (t1 - t0).to(gl.int32)
        target, add = _target_of(out, partial, segment, slot, group, slab, n_slabs, out_groups, INTO, SLAB)
        d_tiles = gl.allocate_shared_memory(
            d_0.dtype.element_ty, [(HELD or STAGES) * GROUPS, BK, ROWS], layout
        )
        a_tiles = gl.allocate_shared_memory(a.dtype.element_ty, [STAGES, BK, SLAB_COLS], layout)
        ready, empty = _barriers(STAGES)
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        d_tiles, a_tiles, ready, empty, target, add, pairs, row_sign, flips, padded_rows, begin,
                        n_pairs, length, part, 0, COLUMN_SIGNS, PARTS, ROWS, SLAB_COLS, BK, STAGES,
                        HELD,
                    ),
                ),
                (
                    _multiply,
                    (
                        d_tiles, a_tiles, ready, empty, target, add, pairs, row_sign, flips, padded_rows, begin,
                        n_pairs, length, part, 1, COLUMN_SIGNS, PARTS, ROWS, SLAB_COLS, BK, STAGES,
                        HELD,
                    ),
                ),
                (
                    _bring,
                    (
                        d_0, d_1, d_2, a, pairs, d_tiles, a_tiles, ready, empty, rows_0, rows_1, rows_2, stride_0,
                        stride_1, stride_2, cols, stride_a, begin_1, begin_2, begin, n_pairs, t0, length, part, ALONE,
                        PARTS, ROWS, SLAB_COLS, BK, STAGES,
                        HELD,
                    ),
                ),
            ],
            [WARPS, WARPS],
            [OF_SECOND, OF_COPIES],
        )  # fmt: skip
