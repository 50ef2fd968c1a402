"""Triton kernels behind `fold_columns` and `sketch_linear`.

`slab_kernel` is one long matrix product per (chunk of a segment, slab, group of block pairs, part of the slab): its K
runs over block pairs x tokens and the float32 accumulator is never reset on the way. The XORs are in the operands'
addresses (multiples of 8 elements, so that a 16-byte load stays whole). Signs flip the accumulator where the pair
changes: it holds the sums times the signs of the current pair, which is exact, and both operands go to the tensor core
as they lie in shared memory. Signs of columns are in the inputs already where there is a fold.

D is read once: the parts of a slab own disjoint rows of every block.

Matrices that read the same inputs (q, k and v; gate and up) are one matrix to it: `Stack`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ... import _native, _triton
from ..._launch import MEMBERS, Launch, padded, usual
from ..._triton import takes_turns
from ...plan import MatrixPlan
from .._device_plan import (
    cached,
    column_flips,
    matrix_tables,
    pair_words,
    slab_row_signs,
    upload,
    what_d_is_of,
)
from .._triton_pairs import WARP, block_of, columns_of, matrix_of, pick_word, row_flips, share_of
from .._triton_segments import Chunks, chunk_of, cut, reduce_partials
from .turns import (
    A_STAYS,
    HELD_FROM,
    HELD_STEPS,
    TURNS_FROM,
    TURNS_STEP,
    WIDE_SUMS,
    turns_launch,
    turns_options,
)

# ------------------------------------------------------------------------------------------------- fold
# Measured on an H200, 8960 features folded to 64, 128 and 256: 73, 74 and 75 us; 8 tokens and 4 warps 73, 94 and 81.
FOLD_TOKENS, FOLD_WARPS = 16, 8


@triton.jit(do_not_specialize=["n_tokens"])
def fold_kernel(
    x,  # [tokens, cols], rows stride_x apart
    out,  # [tokens, width], contiguous
    sign,  # int8 [cols]
    offset,  # int32 [ceil(cols / width)]
    cols,
    width,
    stride_x,
    n_tokens,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """``out[t, j] = sum_b sign(c) x[t, c]``, ``c = b width + (j ^ offset[b])``: an XOR is its own inverse."""
    pid = tl.program_id(0).to(tl.int64)
    col_parts = tl.cdiv(width, BW)
    t = (pid // col_parts) * BT + tl.arange(0, BT)
    j = (pid % col_parts).to(tl.int32) * BW + tl.arange(0, BW)
    row = x + t[:, None] * stride_x
    inside = t[:, None] < n_tokens
    total = tl.zeros((BT, BW), tl.float32)
    for b in tl.range(0, tl.cdiv(cols, width), loop_unroll_factor=4):  # several loads in flight
        c = b * width + (j ^ tl.load(offset + b))
        c = tl.max_contiguous(tl.multiple_of(c, 8), 8)
        valid = (j < width) & (c < cols)
        s = tl.load(sign + c, mask=valid, other=0).to(tl.float32)
        total += (
            tl.load(row + c[None, :], mask=inside & valid[None, :], other=0.0).to(tl.float32) * s[None, :]
        )
    tl.store(
        out + t[:, None] * width + j[None, :],
        total.to(out.dtype.element_ty),
        mask=inside & (j < width)[None, :],
    )


@functools.cache
def fold_launch(width: int) -> tuple[Launch, int]:
    """The launch of a fold to ``width`` features, and the programs that share a token's."""
    block = min(128, max(16, _triton.next_power_of_two(width)))
    launch = Launch(fold_kernel, BT=FOLD_TOKENS, BW=block, num_warps=FOLD_WARPS)
    return launch, _triton.ceil_div(width, block)


def fold_columns(x: torch.Tensor, sign: torch.Tensor, offset: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` [tokens, cols] folded to [tokens, width]; ``width = cols`` with offset 0 only applies the signs."""
    x = _native.rows_view(x)
    return fold_rows(x, x.shape[0], x.stride(0), sign, offset, width)


def fold_rows(
    x: torch.Tensor, n_tokens: int, stride: int, sign: torch.Tensor, offset: torch.Tensor, width: int
) -> torch.Tensor:
    """`fold_columns` of ``x`` with any number of axes, whose rows lie ``stride`` apart."""
    out = torch.empty(n_tokens, width, dtype=x.dtype, device=x.device)
    if n_tokens:
        launch, parts = fold_launch(width)
        grid = (_triton.ceil_div(n_tokens, FOLD_TOKENS) * parts,)
        launch(grid, (x, out, sign, offset), (x.shape[-1], width, stride), (n_tokens,))
    return out


def fold_tables(plan: MatrixPlan, device: torch.device, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The signs and offsets of a fold of the outputs (``rows``), or of the inputs."""
    tables = matrix_tables(plan, device)
    return (tables.row_sign, tables.row_fold) if rows else (tables.col_sign, tables.col_fold)


# ------------------------------------------------------------------------------------------------- slab
@dataclasses.dataclass(frozen=True)
class SlabConfig:
    """Tile of the slab, tokens per step, and how the compiler pipelines. A pure function of dtype and slab shape."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


CHUNK_TOKENS = 512  # of a segment per partial result
# Of tiles of up to 128 columns: two programs a multiprocessor, where a few more would leave one. Measured on an H200,
# 16384 tokens of 8960 x 1536 folded to 128: two programs 125 us, one 145.
MOST_REGISTERS = 128
# Of a group, of slabs wider than 128 columns; docs/gpu.md says what 36 would give.
MOST_PAIRS = 18


def group_pairs(slab_cols: int, pairs: int) -> int:
    """Block pairs per partial result, of ``pairs`` of a slab: few enough that the programs of a usual batch fill the
    device several times. Wider slabs have more pairs, and a partial result for each group.

    Measured on an H200, 16384 tokens, microseconds, long chunks first:

    - 8960 x 1536 folded to 64 (18 pairs): 12 a group 96; to 128 (35): 12 a group 125, 18 130; to 256 (70): 12 214,
      18 184, 24 209;
    - without a fold, 1536 x 8960 (420): 18 1012, 24 1158; 1536 x 1536 (72): 8 212, 12 220, 18 200, 24 220; 256 x 1536
      (12): 3 57, 4 52, 6 62, 12 106.
    """
    if slab_cols <= 128:
        return 12
    # Of many pairs, what it takes to write and add up the partial results would outweigh the rest.
    most = max(MOST_PAIRS, 24) if pairs > 1000 else MOST_PAIRS
    return min(most, max(4, _triton.ceil_div(pairs, 4)))


def lanes(slab_cols: int) -> int:
    """For the words of a group's pairs, whatever their number."""
    return _triton.next_power_of_two(group_pairs(slab_cols, 1 << 30))


def slab_config(slab_cols: int, dtype: torch.dtype, shared: int) -> SlabConfig:
    """By the shared memory of a block: 227 KB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, 89 and 120.

    Chunks and groups do not depend on the device, so neither does the order of the partial results.
    """
    if dtype == torch.float32:  # exact products, no tensor cores
        return SlabConfig(64, min(64, max(16, slab_cols)), 16, 4, 2)
    large = SlabConfig(128, min(256, max(16, slab_cols)), 64, 8, 4)
    if shared >= WIDEST_TILE:
        return large
    return dataclasses.replace(large, BN=min(128, large.BN), num_stages=3)


WIDEST_TILE = 4 * (128 + 256) * 64 * 2  # bytes: four stages of both operands


INTO = ("out", "slots", "sums")  # where results go, see `slab_kernel`


@triton.jit(
    do_not_specialize=["begin_1", "begin_2", "n_segments", "n_slabs", "groups", "group_pairs", "out_groups"]
)
def slab_kernel(
    d_0,  # [tokens, rows_0], rows stride_0 apart
    d_1,
    d_2,
    a,  # [tokens, cols], rows stride_a apart
    out,  # float32 [segments, n_slabs * SLAB]
    partial,  # float32 [slots, out_groups, n_slabs * SLAB]
    table,  # of the chunks
    pairs,  # int64 [pairs], see Stack
    first,  # int32 [n_slabs + 1]
    row_sign,  # [2, padded_rows] in the dtype of d: the signs, and the signs times -1
    flips,  # int32 [pairs, 8], see Stack
    rows_0,
    rows_1,
    rows_2,
    stride_0,
    stride_1,
    stride_2,
    cols,
    stride_a,
    padded_rows,
    begin_1,  # first row block of the second matrix
    begin_2,
    n_segments,
    n_slabs,
    groups,
    group_pairs,  # <= PAIRS
    out_groups,
    SLAB_ROWS: tl.constexpr,
    SLAB_COLS: tl.constexpr,
    COLUMN_SIGNS: tl.constexpr,
    ALONE: tl.constexpr,
    INTO: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """COLUMN_SIGNS: of the inputs, which ``flips`` has. ALONE: there is one matrix. INTO: where results go. "out": of
    segments of one chunk to ``out``, of others to ``partial``, whose slots are written; "slots": all to ``partial``;
    "sums": all are added to what ``partial`` holds."""
    COL_PARTS: tl.constexpr = (SLAB_COLS + BN - 1) // BN
    PARTS: tl.constexpr = (SLAB_ROWS // BM) * COL_PARTS
    SLAB: tl.constexpr = SLAB_ROWS * SLAB_COLS
    pid = tl.program_id(0).to(tl.int64)  # parts of one chunk run side by side: they share its tokens in L2
    part = (pid % PARTS).to(tl.int32)
    group = (pid // PARTS % groups).to(tl.int32)
    slab = pid // PARTS // groups % n_slabs
    segment, t0, t1, slot = chunk_of(table, pid // PARTS // groups // n_slabs)
    if segment < n_segments:
        i = part // COL_PARTS * BM + tl.arange(0, BM)
        j = part % COL_PARTS * BN + tl.arange(0, BN)
        token = tl.arange(0, BK)
        # All that depends on the pair is loaded here, once: a load in the loop whose result is an address of another
        # one would cost the pipeline a stage.
        lane = tl.arange(0, PAIRS if PAIRS < WARP else WARP)
        begin, n_pairs = share_of(first, slab, group, group_pairs)
        words = tl.load(pairs + begin + lane, mask=lane < n_pairs, other=0)
        behind = words
        if PAIRS > WARP:
            behind = tl.load(pairs + begin + WARP + lane, mask=lane + WARP < n_pairs, other=0)
        length = (t1 - t0).to(tl.int32)
        a_token = token.to(tl.int64) * stride_a
        acc = tl.zeros((BM, BN), tl.float32)
        t = tl.zeros((), tl.int32)
        p = tl.zeros((), tl.int32)
        for _ in range(0, n_pairs * tl.cdiv(length, BK)):
            word = pick_word(words, behind, lane, p, PAIRS)
            block, row = block_of(word), i ^ (word & 0xFFFF).to(tl.int32)
            c = columns_of(word, j, SLAB_COLS)
            d, rows, stride_d, block = matrix_of(
                block, d_0, d_1, d_2, rows_0, rows_1, rows_2, stride_0, stride_1, stride_2, begin_1, begin_2, ALONE
            )  # fmt: skip
            r = tl.max_contiguous(tl.multiple_of(block * SLAB_ROWS + row, 8), 8)
            live = token < length - t
            inside = c < cols
            if SLAB_COLS < BN:
                inside = inside & (j < SLAB_COLS)
            at = t0 + t
            d_token = token.to(tl.int64) * stride_d
            x = tl.load(
                d + at * stride_d + (d_token[None, :] + r[:, None]),
                mask=live[None, :] & (r < rows)[:, None],
                other=0.0,
            )
            y = tl.load(
                a + at * stride_a + (a_token[:, None] + c[None, :]),
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            acc = tl.dot(x, y, acc, input_precision="ieee")
            t += BK
            done = t >= length
            # A product whose result is used under a condition alone may run on while the next tiles are fetched.
            if done:
                after = pick_word(words, behind, lane, p + 1, PAIRS)  # no pair: 0
                more = p + 1 < n_pairs
                flip = row_flips(row_sign, word, after, more, i, padded_rows, SLAB_ROWS)[:, None]
                if COLUMN_SIGNS:
                    low = tl.arange(0, 8)
                    of_pair = flips + (begin + p) * 8 + low
                    bits = tl.load(of_pair) ^ tl.load(of_pair + 8, mask=(low >= 0) & more, other=0)
                    high = part % COL_PARTS * (BN // 8) + tl.arange(0, BN // 8)
                    flip ^= tl.reshape(bits[None, :] >> high[:, None] << 31, (BN,))[None, :]
                acc = (acc.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
            p += done.to(tl.int32)
            t = tl.where(done, 0, t)
        keep = (j < SLAB_COLS)[None, :] & (i >= 0)[:, None]
        place = i[:, None] * SLAB_COLS + j[None, :]
        target = partial + ((slot * out_groups + group) * n_slabs + slab) * SLAB
        if INTO == "slots":
            tl.store(target + place, acc, mask=keep)
        elif INTO == "sums":
            tl.store(target + place, tl.load(target + place, mask=keep, other=0.0) + acc, mask=keep)
        else:
            alone = slot < 0
            target = tl.where(alone, out + (segment * n_slabs + slab) * SLAB, target) + place
            tl.store(target, tl.load(target, mask=keep & alone, other=0.0) + acc, mask=keep)


def slab_options(slab_cols: int, dtype: torch.dtype, shared: int) -> dict[str, Any]:
    """`slab_config`, with what lets two programs share a multiprocessor where their tiles are small enough."""
    config = slab_config(slab_cols, dtype, shared)
    options = dataclasses.asdict(config)
    if config.BN == 64 and config.num_warps == 8:
        options["maxnreg"] = MOST_REGISTERS
    if config.BN == 128 and shared >= WIDEST_TILE:
        options |= {"num_stages": 3, "maxnreg": MOST_REGISTERS}
    return options


@functools.cache
def slab_launch(slab_rows: int, slab_cols: int, options: tuple[tuple[str, Any], ...], into: str) -> Launch:
    return Launch(slab_kernel, SLAB_ROWS=slab_rows, SLAB_COLS=slab_cols, INTO=into, **dict(options))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices whose inputs are folded alike, one above the other: their row blocks are numbered through.

    ``pairs`` int64 [pairs], sorted by slab: block pair and its draw in one word, so that a step loads one number. Bits
    0-15 row XOR, 16-31 column XOR, 32-47 column block, 48-62 row block, 63 set where the pair sign is -1. ``first``
    int32 [slabs + 1]: pairs ``first[q] .. first[q + 1]`` go to slab q. ``row_sign`` as in `slab_row_signs`, ``flips``
    as in `column_flips`, sorted like the pairs (anything where a fold has applied the signs).
    """

    pairs: torch.Tensor
    first: torch.Tensor
    row_sign: torch.Tensor
    flips: torch.Tensor
    begins: tuple[int, ...]  # first row block of the second and of the third matrix
    rows: list[int]  # as many as a kernel has parameters for
    cols: int
    n_slabs: int
    groups: int
    group_pairs: int
    chunk: int  # tokens
    wide: bool  # a tile that wide has no registers left to add to what is there, unless by turns
    into: str  # of `INTO`, what a pass's launches take: its sums, or slots of their own that are added up at once
    programs: int  # of a chunk
    launches: dict[str, Launch]
    turns: dict[str, Launch]  # of `turns_launch`; empty where it does not serve
    turns_programs: int  # of a chunk


def stack_of(plans: tuple[MatrixPlan, ...], device: torch.device, dtype: torch.dtype) -> Stack:
    return cached(plans[0], device, lambda: _stack(plans, device, dtype), (plans[1:], dtype))


def _stack(plans: tuple[MatrixPlan, ...], device: torch.device, dtype: torch.dtype) -> Stack:
    plan = plans[0]
    begins = np.cumsum([0, *(p.n_row_blocks for p in plans)])
    words = pair_words(plans)
    slab = np.concatenate([p.pair_slab.reshape(-1) for p in plans]).astype(np.int64)
    counts = np.bincount(slab, minlength=plan.n_slabs)
    most = int(counts.max())
    groups = _triton.ceil_div(most, group_pairs(plan.slab_cols, most))
    options = slab_options(plan.slab_cols, dtype, _triton.shared_memory(device))
    parts = plan.slab_rows // options["BM"] * _triton.ceil_div(plan.slab_cols, options["BN"])
    signs, wide = plan.col_fold is None, options["BN"] > 128
    held = signs and plan.slab_cols == 256 and plan.n_col_blocks >= HELD_FROM
    stays = A_STAYS and plan.slab_cols == 256
    held = held and not stays and chunk_tokens(plan.n_slabs) <= HELD_STEPS * TURNS_STEP
    alone = wide and len(plans) == 1
    options |= {"PAIRS": lanes(plan.slab_cols), "COLUMN_SIGNS": signs, "ALONE": alone}
    launch = functools.partial(slab_launch, plan.slab_rows, plan.slab_cols, tuple(options.items()))
    turns, turns_parts = {}, 1
    if dtype == torch.bfloat16 and plan.slab_cols >= TURNS_FROM and takes_turns(device):
        of_turns = turns_options(plan.slab_cols, groups, held, stays)
        turns_parts = of_turns.get("PARTS", 1)
        turns = {
            into: turns_launch(plan.slab_rows, plan.slab_cols, signs, alone, tuple(of_turns.items()), into)
            for into in INTO
        }
    rows, cols = [p.folded_rows for p in plans], plan.folded_cols
    adds = not wide or bool(turns and WIDE_SUMS and usual((), (*rows, cols), ()))
    alike = words & np.uint64(what_d_is_of(plan.slab_rows) if held else 0xFFFF << 32 if stays else 0)
    order = np.lexsort((alike, slab))
    first = upload(np.concatenate([[0], np.cumsum(counts)]), np.int32, device)
    none = (1 << 15,) * (MEMBERS - len(plans))  # above every block
    return Stack(
        pairs=upload(words[order].view(np.int64), np.int64, device),
        first=first,
        row_sign=slab_row_signs(plans, device, dtype),
        flips=upload(column_flips(plans)[order], np.int32, device) if signs else first,
        begins=(*map(int, begins[1:-1]), *none),
        rows=padded(rows),
        cols=cols,
        n_slabs=plan.n_slabs,
        groups=groups,
        group_pairs=_triton.ceil_div(most, groups),
        chunk=chunk_tokens(plan.n_slabs),
        wide=wide,
        into="sums" if adds else "slots",
        programs=plan.n_slabs * groups * parts,
        launches={into: launch(into) for into in INTO},
        turns=turns,
        turns_programs=plan.n_slabs * groups * turns_parts,
    )


def chunk_tokens(n_slabs: int) -> int:
    """Many slabs fill the device, their partial results its memory."""
    return CHUNK_TOKENS * min(16, n_slabs)


def add_slabs(
    stack: Stack,
    ds: list[torch.Tensor],
    strides: list[int] | None,
    a: torch.Tensor,
    stride_a: int,
    out: torch.Tensor,
    partial: torch.Tensor,
    chunks: Chunks,
    into: str,
) -> None:
    """One launch: what the matrices' output gradients ``ds`` and their inputs ``a`` give, as `slab_kernel` says.

    ``strides``: of the rows of ``ds``; None: they are dense."""
    launch, programs, ds = stack.launches[into], stack.programs, padded(ds)
    # Their copies of 16 bytes want rows that begin, and end, at multiples of 16 bytes.
    sizes = (*stack.rows, *(stack.rows if strides is None else padded(strides)), stack.cols, stride_a)
    if stack.turns and usual([*map(torch.Tensor.data_ptr, (*ds, a))], sizes, ()):
        launch, programs = stack.turns[into], stack.turns_programs
    launch(
        (chunks.n_items * programs,),
        (*ds, a, out, partial, chunks.table, stack.pairs, stack.first, stack.row_sign, stack.flips),
        (*sizes, stack.row_sign.shape[1]),
        (*stack.begins, chunks.n_segments, stack.n_slabs, stack.groups, stack.group_pairs, partial.shape[1]),
    )


def alike(d: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with contiguous columns, and in one dtype."""
    wide = torch.promote_types(d.dtype, a.dtype)
    return _native.rows_view(d).to(wide), _native.rows_view(a).to(wide)


def sketch_linear(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """``out[s] += S vec(sum_t d[t]^T a[t])`` for folded operands on one device; ``offsets`` int64 on that device."""
    d, a = alike(d, a)
    n_tokens = d.shape[0]
    if n_tokens == 0 or offsets.numel() == 1:
        return
    stack = stack_of((plan,), d.device, d.dtype)
    always = stack.groups > 1 or stack.wide
    chunks = cut(offsets, n_tokens, stack.chunk, always)
    partial = torch.empty(chunks.n_slots, stack.groups, out.shape[1], dtype=torch.float32, device=d.device)
    into = "slots" if always else "out"
    add_slabs(stack, [d], [d.stride(0)], a, a.stride(0), out, partial, chunks, into)
    reduce_partials(partial, out, chunks, stack.groups)
