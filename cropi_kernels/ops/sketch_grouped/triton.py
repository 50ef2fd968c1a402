"""Triton kernel behind `sketch_grouped`.

`grouped_kernel` is the slab product of ops/sketch_linear/triton.py with a longer sum: over the entries (group, block
pair) of its share, and over the tokens of each entry's range. A program owns a part of one segment's slab, so that the
accumulator takes in many experts and is flushed once. Entries without tokens take no step.

The entries are known from the plan alone (`grouped_pairs`), the ranges from the offsets, which the host never reads.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import triton
import triton.language as tl

from ... import _triton
from ..._launch import Launch
from ...plan import MatrixPlan
from .._device_plan import cached, pair_words, slab_row_signs
from .._triton_pairs import block_of, columns_of, pick, share_of
from .._triton_segments import cut, offset_of, reduce_partials
from ..sketch_linear.triton import SlabConfig, alike, fold_columns, fold_tables, slab_config

GROUP_PAIRS = 24  # entries of a partial result, where no limit below asks for more
# Results of one slab and segment that are added up, 128 KiB each; more where one would have more than MOST_ENTRIES.
MOST_PARTIALS = 32
MOST_ENTRIES = 256  # entries of a result, one a lane: more would fill the registers
MOST_REGISTERS = 200  # of a thread, in `register_limit`


@dataclasses.dataclass(frozen=True)
class GroupedPairs:
    """Entries sorted by (slab, group, block pair): ``words`` int64 as in `Stack.pairs`, ``group`` int32.

    ``first`` int32 [slabs + 1]: entries ``first[q] .. first[q + 1]`` go to slab q. A block that several groups share
    has an entry for each.
    """

    words: torch.Tensor
    group: torch.Tensor
    first: torch.Tensor
    most: int  # of one slab


def grouped_pairs(
    plan: MatrixPlan, n_groups: int, rows: int, first_row: int, row_step: int, device: torch.device
) -> GroupedPairs:
    def build() -> GroupedPairs:
        words = pair_words((plan,)).reshape(plan.pair_slab.shape)
        slabs, blocks, groups = [], [], []
        for group in range(n_groups):
            begin = first_row + group * row_step
            span = slice(begin // plan.slab_rows, (begin + rows - 1) // plan.slab_rows + 1)
            slabs.append(plan.pair_slab[span].reshape(-1).astype(np.int64))
            blocks.append(words[span].reshape(-1))
            groups.append(np.full(blocks[-1].shape, group, np.int32))
        slab = np.concatenate(slabs)
        order = np.argsort(slab, kind="stable")
        counts = np.bincount(slab, minlength=plan.n_slabs)
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        word = np.concatenate(blocks)[order].view(np.int64)
        return GroupedPairs(
            torch.from_numpy(word).to(device),
            torch.from_numpy(np.concatenate(groups)[order]).to(device),
            torch.from_numpy(first).to(device),
            int(counts.max()),
        )

    return cached(plan, device, build, ("grouped", n_groups, rows, first_row, row_step))


@triton.jit(do_not_specialize=["n_segments", "n_tokens", "n_slabs", "shares", "share_entries"])
def grouped_kernel(
    d,  # [tokens, rows], rows stride_d apart
    a,  # [tokens, cols], rows stride_a apart
    partial,  # float32 [segments, shares, n_slabs * SLAB]
    offsets,  # int64 [groups * segments + 1]
    words,  # int64 [entries], see GroupedPairs
    group,  # int32 [entries]
    first,  # int32 [n_slabs + 1]
    row_sign,  # [2, padded_rows] in the dtype of d: the signs, and the signs times -1
    rows,  # of a group
    cols,
    first_row,
    row_step,
    padded_rows,
    stride_d,
    stride_a,
    n_segments,
    n_tokens,
    n_slabs,
    shares,
    share_entries,  # <= ENTRIES
    SLAB_ROWS: tl.constexpr,
    SLAB_COLS: tl.constexpr,
    ENTRIES: tl.constexpr,
    ALIGNED: tl.constexpr,  # first_row and row_step are multiples of 8
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    COL_PARTS: tl.constexpr = (SLAB_COLS + BN - 1) // BN
    PARTS: tl.constexpr = (SLAB_ROWS // BM) * COL_PARTS
    SLAB: tl.constexpr = SLAB_ROWS * SLAB_COLS
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % PARTS).to(tl.int32)
    share = (pid // PARTS % shares).to(tl.int32)
    slab = pid // PARTS // shares % n_slabs
    segment = pid // PARTS // shares // n_slabs
    i = part // COL_PARTS * BM + tl.arange(0, BM)
    j = part % COL_PARTS * BN + tl.arange(0, BN)
    token = tl.arange(0, BK)
    # All that depends on the entry is loaded here, once, one entry a lane.
    lane = tl.arange(0, ENTRIES)
    begin, n_entries = share_of(first, slab, share, share_entries)
    mine = lane < n_entries
    word_of = tl.load(words + begin + lane, mask=mine, other=0)
    group_of = tl.load(group + begin + lane, mask=mine, other=0).to(tl.int64)
    at_range = group_of * n_segments + segment
    t0_of = offset_of(offsets, at_range, mine, n_tokens)
    length_of = tl.maximum(offset_of(offsets, at_range + 1, mine, n_tokens) - t0_of, 0).to(tl.int32)
    length_of = tl.where(mine, length_of, 0)
    row_of = (first_row + group_of * row_step).to(tl.int32)
    steps_of = (length_of + BK - 1) // BK
    end_of = tl.cumsum(steps_of, 0)  # steps up to and with this entry: entries without tokens are passed over
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.sum(steps_of, 0)):
        p = tl.sum((end_of <= step).to(tl.int32), 0)
        word = pick(word_of, lane, p)
        t = (step - pick(end_of - steps_of, lane, p)) * BK
        live = token < pick(length_of, lane, p) - t
        at = pick(t0_of, lane, p) + t + token
        base = pick(row_of, lane, p)
        r = block_of(word) * SLAB_ROWS + (i ^ (word & 0xFFFF).to(tl.int32))
        r = tl.max_contiguous(tl.multiple_of(r, 8), 8)
        c = columns_of(word, j, SLAB_COLS)
        local = r - base
        local = tl.max_contiguous(tl.multiple_of(local, 8), 8) if ALIGNED else tl.max_contiguous(local, 8)
        inside = c < cols
        if SLAB_COLS < BN:
            inside = inside & (j < SLAB_COLS)
        x = tl.load(
            d + at[None, :] * stride_d + local[:, None],
            mask=live[None, :] & ((local >= 0) & (local < rows))[:, None],
            other=0.0,
        )
        y = tl.load(a + at[:, None] * stride_a + c[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        sign = tl.load(row_sign + tl.where(word < 0, padded_rows, 0) + r)
        x = x * sign[:, None]
        acc = tl.dot(x, y, acc, input_precision="ieee")
    keep = (j < SLAB_COLS)[None, :] & (i >= 0)[:, None]
    target = partial + ((segment * shares + share) * n_slabs + slab) * SLAB
    tl.store(target + i[:, None] * SLAB_COLS + j[None, :], acc, mask=keep)


def register_limit(aligned: bool, columns: int, entries: int) -> dict[str, int]:
    """Said for one kind of tile, or ptxas takes 128 registers for it on compute capability 10 and spills four; said so,
    it takes 116."""
    return {"maxnreg": MOST_REGISTERS} if not aligned and columns <= 64 and entries <= 32 else {}


@functools.cache
def grouped_launch(slab_rows: int, slab_cols: int, entries: int, aligned: bool, config: SlabConfig) -> Launch:
    return Launch(
        grouped_kernel, SLAB_ROWS=slab_rows, SLAB_COLS=slab_cols, ENTRIES=entries, ALIGNED=aligned,
        **dataclasses.asdict(config), **register_limit(aligned, config.BN, entries),
    )  # fmt: skip


def sketch_grouped(
    d: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    out: torch.Tensor,
    first_row: int,
    row_step: int,
) -> None:
    """As the reference, for folded ``a`` and tensors on one device; ``offsets`` int64 on that device."""
    d, a = alike(d, a)
    (n_tokens, rows), n_segments = d.shape, out.shape[0]
    if n_tokens == 0 or n_segments == 0 or offsets.numel() == 1:
        return
    n_groups = (offsets.numel() - 1) // n_segments
    entries = grouped_pairs(plan, n_groups, rows, first_row, row_step, d.device)
    if plan.col_fold is None:
        a = fold_columns(a, *fold_tables(plan, d.device, rows=False), plan.folded_cols)
    row_sign = slab_row_signs((plan,), d.device, d.dtype)
    config = slab_config(plan.slab_cols, d.dtype, _triton.shared_memory(d.device))
    share_entries = min(MOST_ENTRIES, max(GROUP_PAIRS, _triton.ceil_div(entries.most, MOST_PARTIALS)))
    shares = _triton.ceil_div(entries.most, share_entries)
    share_entries = _triton.ceil_div(entries.most, shares)
    partial = torch.empty(n_segments, shares, out.shape[1], dtype=torch.float32, device=d.device)
    parts = plan.slab_rows // config.BM * _triton.ceil_div(plan.slab_cols, config.BN)
    aligned = first_row % 8 == 0 and row_step % 8 == 0
    lanes = _triton.next_power_of_two(share_entries)
    grouped_launch(plan.slab_rows, plan.slab_cols, lanes, aligned, config)(
        (n_segments * plan.n_slabs * shares * parts,),
        (d, a, partial, offsets, entries.words, entries.group, entries.first, row_sign),
        (rows, plan.folded_cols, first_row, row_step, row_sign.shape[1], d.stride(0), a.stride(0)),
        (n_segments, n_tokens, plan.n_slabs, shares, share_entries),
    )
    one_each = torch.arange(n_segments + 1, device=d.device)
    reduce_partials(partial, out, cut(one_each, n_segments, 1, True), shares)
