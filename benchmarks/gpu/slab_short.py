"""Forms of `slab_turns_kernel` for short segments, which do not ship: `variants_short` times them beside what does.

- tails of 16: a product is of 16 tokens, and of a segment's last step no more are copied and multiplied than it has.
  In `slab_turns_kernel` a step is of 64, with zeros beyond the end: 64 segments of 102 to 410 tokens are 1.129 times as
  many tokens in steps of 64, 1.030 in steps of 16.
- programs that stay: as many programs as the device holds, each of which takes the next item when it has copied its
  last: items are given out by a counter, in the order of the grid. So the next item's operands come while sums are
  written, and no program starts but the first ones.

The bits are those of `slab_turns_kernel`: the same sums in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cropi_kernels._launch import Launch, usual
from cropi_kernels.ops._gluon import load_by_threads
from cropi_kernels.ops._triton_segments import Chunks
from cropi_kernels.ops.sketch_linear import triton as slab
from cropi_kernels.ops.sketch_linear.triton import SIGN_BIT, Stack
from cropi_kernels.ops.sketch_linear.triton_turns import (
    GROUPS,
    THREADS,
    WARPS,
    _bits_of_columns,
    _chunk_of,
    _pieces_of_16_bytes,
    _row_signs,
)

ORDERS = gl.constexpr(2)  # items that are told ahead


@gluon.jit
def item_of(item, table, first, n_segments, n_slabs, groups, group_pairs, PARTS: gl.constexpr):
    """(part, group, slab, slot, first pair, pairs, whether there is one, first token, tokens)"""
    item = item.to(gl.int64)
    part = (item % PARTS).to(gl.int32)
    group = (item // PARTS % groups).to(gl.int32)
    slab = item // PARTS // groups % n_slabs
    segment, t0, t1, slot = _chunk_of(table, item // PARTS // groups // n_slabs)
    begin = gl.load(first + slab) + group * group_pairs
    n_pairs = gl.maximum(gl.minimum(group_pairs, gl.load(first + slab + 1) - begin), 0)
    n_pairs = gl.where(segment < n_segments, n_pairs, 0)
    length = gl.where(n_pairs > 0, (t1 - t0).to(gl.int32), 0)
    return part, group, slab, slot, begin, n_pairs, segment < n_segments, t0, length


@gluon.jit
def copy(
    d_tiles, a_tiles, stage, from_d, from_a, stride_d, stride_a, rows, cols, first_row, part, word, c, left,
    K: gl.constexpr, PIECE: gl.constexpr, BK: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """Piece K of a step; ``left``: tokens that its segment has from the step's first on."""
    of_d: gl.constexpr = _pieces_of_16_bytes(ROWS)
    place = stage * (BK // PIECE) + K
    d_token = K * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, of_d))
    a_token = K * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, _pieces_of_16_bytes(COLS)))
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(0, of_d))
    for group in gl.static_range(GROUPS):
        r = first_row + (((part * GROUPS + group) * ROWS + i) ^ (word & 0xFFFF).to(gl.int32))
        r = gl.max_contiguous(gl.multiple_of(r, 8), 8)
        load_by_threads(
            d_tiles.index(place * GROUPS + group),
            from_d + (d_token.to(gl.int64)[:, None] * stride_d + r[None, :]),
            mask=(d_token < left)[:, None] & (r < rows)[None, :],
        )
    load_by_threads(
        a_tiles.index(place),
        from_a + (a_token.to(gl.int64)[:, None] * stride_a + c[None, :]),
        mask=(a_token < left)[:, None] & (c < cols)[None, :],
    )


@gluon.jit
def bring(
    d, a, table, pairs, first, d_tiles, a_tiles, ready, empty, orders, told, taken, counter, rows, stride_d, cols,
    stride_a, n_segments, n_slabs, groups, group_pairs, n_items, PIECE: gl.constexpr, STAYS: gl.constexpr,
    PARTS: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, _pieces_of_16_bytes(COLS)))
    step = 0
    n = 0
    item = gl.program_id(0)
    part, group, slab, slot, begin, n_pairs, real, t0, length = item_of(
        item, table, first, n_segments, n_slabs, groups, group_pairs, PARTS
    )
    word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
    while item < n_items:
        next_item, next_part, next_begin, next_pairs = item * 0 + n_items, part, begin, n_pairs
        next_t0, next_length, next_word = t0, length, word
        for p in range(0, gl.maximum(n_pairs, 1)):
            after = gl.load(pairs + begin + gl.minimum(p + 1, n_pairs - 1), mask=n_pairs > 0, other=0)
            if STAYS:
                if p + 1 >= n_pairs:  # what the next item is, is known when this one's last pair is copied
                    next_item = claimed(counter, n_items)
                    next_part, _, _, _, next_begin, next_pairs, _, next_t0, next_length = item_of(
                        gl.minimum(next_item, n_items - 1), table, first, n_segments, n_slabs, groups, group_pairs,
                        PARTS,
                    )  # fmt: skip
                    next_word = gl.load(pairs + next_begin, mask=next_pairs > 0, other=0)
            first_row = (word >> 48 & 0x7FFF).to(gl.int32) * (PARTS * GROUPS * ROWS)
            c = (word >> 32 & 0xFFFF).to(gl.int32) * COLS + (j ^ (word >> 16 & 0xFFFF).to(gl.int32))
            c = gl.max_contiguous(gl.multiple_of(c, 8), 8)
            for t in range(0, length, BK):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                from_d, from_a = d + (t0 + t) * stride_d, a + (t0 + t) * stride_a
                for k in gl.static_range(BK // PIECE):
                    if k == 0 or t + k * PIECE < length:
                        copy(
                            d_tiles, a_tiles, stage, from_d, from_a, stride_d, stride_a, rows, cols, first_row, part,
                            word, c, length - t, k, PIECE, BK, ROWS, COLS,
                        )  # fmt: skip
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                step += 1
            word = after
        item, part, begin, n_pairs = next_item, next_part, next_begin, next_pairs
        t0, length, word = next_t0, next_length, next_word
        if STAYS:
            tell(orders, told, taken, n, item)
            n += 1


@gluon.jit
def claimed(counter, n_items):
    """The next item. Every program is told once that there is none; the last of them leaves the counter as it was."""
    programs = gl.num_programs(0)
    item = gl.atomic_add(counter, 1) + programs
    if item == n_items + programs - 1:
        gl.store(counter, 0)
    return item


@gluon.jit
def tell(orders, told, taken, n, item):
    place = n % ORDERS
    mbarrier.wait(taken.index(place), ((n // ORDERS) & 1) ^ 1)
    all_alike: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    orders.index(place).store(gl.full([128], 0, gl.int32, layout=all_alike) + item)
    mbarrier.arrive(told.index(place))


@gluon.jit
def told_of(orders, told, taken, n):
    place = n % ORDERS
    mbarrier.wait(told.index(place), (n // ORDERS) & 1)
    item = gl.max(orders.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(taken.index(place))
    return item


@gluon.jit
def multiply(
    d_tiles, a_tiles, ready, empty, orders, told, taken, partial, table, pairs, first, row_sign, flips, padded_rows,
    n_segments, n_slabs, groups, group_pairs, out_groups, n_items, GROUP: gl.constexpr, COLUMN_SIGNS: gl.constexpr,
    PIECE: gl.constexpr, STAYS: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SLAB_ROWS: gl.constexpr = PARTS * GROUPS * ROWS
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    of_bits: gl.constexpr = _bits_of_columns(COLS)
    j = gl.arange(0, COLS, layout=gl.SliceLayout(0, products))
    low = gl.arange(0, 8, layout=gl.SliceLayout(0, of_bits))
    high = gl.arange(0, COLS // 8, layout=gl.SliceLayout(1, of_bits))
    step = 0
    n = 0
    item = gl.program_id(0)
    while item < n_items:
        part, group, slab, slot, begin, n_pairs, real, t0, length = item_of(
            item, table, first, n_segments, n_slabs, groups, group_pairs, PARTS
        )
        i = (part * GROUPS + GROUP) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, products))
        acc = gl.zeros((ROWS, COLS), gl.float32, layout=products)
        word = gl.load(pairs + begin, mask=n_pairs > 0, other=0)
        for p in range(0, n_pairs):
            more = p + 1 < n_pairs
            after = gl.load(pairs + begin + gl.minimum(p + 1, n_pairs - 1))
            for t in range(0, length, PIECE):
                stage = (step + t // BK) % STAGES
                if t % BK == 0:
                    mbarrier.wait(ready.index(stage), ((step + t // BK) // STAGES) & 1)
                    fence_async_shared()
                place = stage * (BK // PIECE) + t % BK // PIECE
                d = d_tiles.index(place * GROUPS + GROUP).permute((1, 0))
                acc = warpgroup_mma(d, a_tiles.index(place), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if (t > 0) & (t % BK == 0):  # the step before has ended
                    mbarrier.arrive(empty.index((step + t // BK - 1) % STAGES))
            step += gl.cdiv(length, BK)
            sign = _row_signs(row_sign, word, i, padded_rows, SLAB_ROWS)
            sign *= gl.where(more, _row_signs(row_sign, after, i, padded_rows, SLAB_ROWS), 1.0)
            flip = (sign.to(gl.int32, bitcast=True) & SIGN_BIT)[:, None]
            if COLUMN_SIGNS:
                of_pair = flips + (begin + p) * 8 + low
                bits = gl.load(of_pair) ^ gl.load(of_pair + 8, mask=(low >= 0) & more, other=0)
                of_columns = (bits[None, :] >> high[:, None] << 31).reshape((COLS,))
                flip = flip ^ gl.convert_layout(of_columns, gl.SliceLayout(0, products))[None, :]
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step - 1) % STAGES))
            acc = (acc.to(gl.int32, bitcast=True) ^ flip).to(gl.float32, bitcast=True)
            word = after
        if real:
            target = partial + ((slot * out_groups + group) * n_slabs + slab) * (SLAB_ROWS * COLS)
            gl.store(target + i[:, None] * COLS + j[None, :], acc + 0.0)
        if STAYS:
            item = told_of(orders, told, taken, n)
            n += 1
        else:
            item = item * 0 + n_items


@gluon.jit(do_not_specialize=["n_segments", "n_slabs", "groups", "group_pairs", "out_groups", "n_items"])
def slab_short_kernel(
    d, a, partial, table, pairs, first, row_sign, flips, counter, rows, stride_d, cols, stride_a, padded_rows,
    n_segments, n_slabs, groups, group_pairs, out_groups, n_items, SLAB_ROWS: gl.constexpr, SLAB_COLS: gl.constexpr,
    COLUMN_SIGNS: gl.constexpr, PIECE: gl.constexpr, STAYS: gl.constexpr, PARTS: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, OF_SECOND: gl.constexpr, OF_COPIES: gl.constexpr,
):  # fmt: skip
    """`slab_turns_kernel` of one matrix into slots. PIECE: tokens of a product; a segment's last step leaves out the
    empty ones. ``counter``: int32, 0 before and after a launch."""
    ROWS: gl.constexpr = SLAB_ROWS // GROUPS // PARTS
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    d_tiles = gl.allocate_shared_memory(
        d.dtype.element_ty, [STAGES * (BK // PIECE) * GROUPS, PIECE, ROWS], layout
    )
    a_tiles = gl.allocate_shared_memory(
        a.dtype.element_ty, [STAGES * (BK // PIECE), PIECE, SLAB_COLS], layout
    )
    orders = gl.allocate_shared_memory(gl.int32, [ORDERS, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [ORDERS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [ORDERS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=THREADS)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for place in gl.static_range(ORDERS):
        mbarrier.init(told.index(place), count=1)
        mbarrier.init(taken.index(place), count=GROUPS)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    d_tiles, a_tiles, ready, empty, orders, told, taken, partial, table, pairs, first, row_sign, flips,
                    padded_rows, n_segments, n_slabs, groups, group_pairs, out_groups, n_items, 0, COLUMN_SIGNS, PIECE,
                    STAYS, PARTS, ROWS, SLAB_COLS, BK, STAGES,
                ),
            ),
            (
                multiply,
                (
                    d_tiles, a_tiles, ready, empty, orders, told, taken, partial, table, pairs, first, row_sign, flips,
                    padded_rows, n_segments, n_slabs, groups, group_pairs, out_groups, n_items, 1, COLUMN_SIGNS, PIECE,
                    STAYS, PARTS, ROWS, SLAB_COLS, BK, STAGES,
                ),
            ),
            (
                bring,
                (
                    d, a, table, pairs, first, d_tiles, a_tiles, ready, empty, orders, told, taken, counter, rows,
                    stride_d, cols, stride_a, n_segments, n_slabs, groups, group_pairs, n_items, PIECE, STAYS, PARTS,
                    ROWS, SLAB_COLS, BK, STAGES,
                ),
            ),
        ],
        [WARPS, WARPS],
        [OF_SECOND, OF_COPIES],
    )  # fmt: skip


class Short:
    """Stands in for `add_slabs`, of one matrix into slots."""

    def __init__(self, piece: int, stays: bool) -> None:
        self.constants = {"PIECE": piece, "STAYS": stays}
        self.launches: dict[Any, tuple[Launch, int]] = {}
        self.counter: torch.Tensor | None = None

    def launch(self, stack: Stack, a: torch.Tensor) -> tuple[Launch, int]:
        """And how many programs a multiprocessor holds."""
        made = stack.turns["slots"].constants
        key = tuple(made.items())
        if key not in self.launches:
            constants = {k: v for k, v in made.items() if k not in ("ALONE", "INTO")} | self.constants
            if self.constants["STAYS"] and "maxnreg" not in made:
                constants |= {"OF_SECOND": 200, "OF_COPIES": 104}  # they have more to remember
            self.launches[key] = Launch(slab_short_kernel, **constants), 2 if "maxnreg" in made else 1
        return self.launches[key]

    def __call__(
        self, stack: Stack, ds: list[torch.Tensor], strides: list[int], a: torch.Tensor, stride_a: int,
        out: torch.Tensor, partial: torch.Tensor, chunks: Chunks, into: str,
    ) -> None:  # fmt: skip
        [d], [stride] = ds, strides
        sizes = stack.rows[0], stride, stack.cols, stride_a, stack.row_sign.shape[1]
        assert into == "slots" and stack.turns and usual([d.data_ptr(), a.data_ptr()], sizes, ())
        launch, resident = self.launch(stack, a)
        if self.counter is None:
            self.counter = torch.zeros(4, dtype=torch.int32, device=a.device)
        programs = n_items = chunks.n_items * stack.turns_programs
        if self.constants["STAYS"]:
            programs = min(n_items, resident * multiprocessors(a.device))
        launch(
            (programs,),
            (
                d,
                a,
                partial,
                chunks.table,
                stack.pairs,
                stack.first,
                stack.row_sign,
                stack.flips,
                self.counter,
            ),
            sizes,
            (chunks.n_segments, stack.n_slabs, stack.groups, stack.group_pairs, partial.shape[1], n_items),
        )


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


FORMS = {
    "tails of 16": Short(16, stays=False),
    "programs that stay": Short(slab.TURNS_STEP, stays=True),
    "tails of 16, programs that stay": Short(16, stays=True),
}
