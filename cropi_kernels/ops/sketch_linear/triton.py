"""Triton kernels behind `fold_columns` and `sketch_linear`.

`slab_kernel` is one long matrix product per (chunk of a segment, slab, group of block pairs, part of the slab): its K
runs over block pairs x tokens and the float32 accumulator is never reset on the way. The XORs are in the operands'
addresses (multiples of 8 elements, so that a 16-byte load stays whole); row sign and pair sign multiply the D operand
on its way from shared memory to the tensor core, column signs are in the inputs already (the fold applies them, or
`sign_columns` where there is no fold).

D is read once: the parts of a slab own disjoint rows of every block.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ... import _gpu, _native, _triton
from ...plan import MatrixPlan
from .._device_plan import matrix_tables, slab_row_signs
from .._triton_segments import SEGMENT_BLOCK, locate, n_items, n_slots, reduce_partials

# ------------------------------------------------------------------------------------------------- fold
FOLD_TOKENS = 8  # measured on an H200, 8960 features: 8 tokens 75 us, 16 tokens 96, 32 tokens 101


@triton.jit
def fold_kernel(
    x,  # [tokens, cols], rows stride_x apart
    out,  # [tokens, width], contiguous
    sign,  # int8 [cols]
    offset,  # int32 [ceil(cols / width)]
    n_tokens,
    cols,
    width,
    stride_x,
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


def fold_columns(x: torch.Tensor, sign: torch.Tensor, offset: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` [tokens, cols] folded to [tokens, width]; ``width = cols`` with offset 0 only applies the signs."""
    x = _native.rows_view(x)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        block = min(128, max(16, _triton.next_power_of_two(width)))
        grid = (triton.cdiv(x.shape[0], FOLD_TOKENS) * triton.cdiv(width, block),)
        with _gpu.on(x):
            fold_kernel[grid](
                x,
                out,
                sign,
                offset,
                x.shape[0],
                x.shape[1],
                width,
                x.stride(0),
                BT=FOLD_TOKENS,
                BW=block,
                num_warps=4,
            )
    return out


def fold_inputs(x: torch.Tensor, plan: MatrixPlan) -> torch.Tensor:
    tables = matrix_tables(plan, x.device)
    return fold_columns(x, tables.col_sign, tables.col_fold, plan.folded_cols)


def fold_outputs(x: torch.Tensor, plan: MatrixPlan) -> torch.Tensor:
    tables = matrix_tables(plan, x.device)
    return fold_columns(x, tables.row_sign, tables.row_fold, plan.folded_rows)


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


def group_pairs(slab_cols: int) -> int:
    """Block pairs per partial result: few enough that the programs of a usual batch fill the device several times.

    Measured on an H200, 16384 tokens of 8960 x 1536: folded to 64, 12 pairs take 103 us, 6 104, 3 112, 24 154; folded
    to 128, 12 take 136, 6 140, 24 193; folded to 256, 6 take 209, 12 215, 24 219. Wider slabs have
    more pairs, and a partial result for each group.
    """
    return 12 if slab_cols <= 128 else 24


def slab_config(slab_cols: int, dtype: torch.dtype, hopper: bool) -> SlabConfig:
    """Chunks and groups do not depend on the device, so neither does the order of the partial results."""
    if dtype == torch.float32:  # exact products, no tensor cores
        return SlabConfig(64, min(64, max(16, slab_cols)), 16, 4, 2)
    if hopper:
        return (
            SlabConfig(128, 256, 64, 8, 4)
            if slab_cols >= 256
            else SlabConfig(128, max(16, slab_cols), 64, 8, 4)
        )
    return SlabConfig(128, min(128, max(16, slab_cols)), 64, 8, 3)


@triton.jit
def _pick(values, lane, index):
    """``values[index]`` of a vector that lives in registers: a few shuffles instead of a load in the loop."""
    return tl.sum(tl.where(lane == index, values, 0), 0)


@triton.jit
def slab_kernel(
    d,  # [tokens, rows], rows stride_d apart
    a,  # [tokens, cols], rows stride_a apart
    out,  # float32 [segments, n_slabs * SLAB]
    partial,  # float32 [slots, groups, n_slabs * SLAB]
    offsets,  # int64 [segments + 1]
    pairs,  # int64 [pairs], see MatrixTables
    first,  # int32 [n_slabs + 1]
    row_sign,  # [2, padded_rows] in the dtype of d: the signs, and the signs times -1
    n_segments,
    n_tokens,
    rows,
    cols,
    padded_rows,
    stride_d,
    stride_a,
    n_slabs,
    groups,
    group_pairs,  # <= PAIRS
    SLAB_ROWS: tl.constexpr,
    SLAB_COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALWAYS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    COL_PARTS: tl.constexpr = (SLAB_COLS + BN - 1) // BN
    PARTS: tl.constexpr = (SLAB_ROWS // BM) * COL_PARTS
    SLAB: tl.constexpr = SLAB_ROWS * SLAB_COLS
    pid = tl.program_id(0).to(tl.int64)  # parts of one chunk run side by side: they share its tokens in L2
    part = (pid % PARTS).to(tl.int32)
    group = (pid // PARTS % groups).to(tl.int32)
    slab = pid // PARTS // groups % n_slabs
    segment, t0, t1, slot = locate(
        offsets, n_segments, n_tokens, pid // PARTS // groups // n_slabs, CHUNK, ALWAYS, SEGMENTS
    )
    if segment < n_segments:
        i = part // COL_PARTS * BM + tl.arange(0, BM)
        j = part % COL_PARTS * BN + tl.arange(0, BN)
        token = tl.arange(0, BK)
        # All that depends on the pair is loaded here, once: a load in the loop whose result is an address of another
        # one would cost the pipeline a stage.
        lane = tl.arange(0, PAIRS)
        begin = tl.load(first + slab) + group * group_pairs
        n_pairs = tl.maximum(tl.minimum(group_pairs, tl.load(first + slab + 1) - begin), 0)
        words = tl.load(pairs + begin + lane, mask=lane < n_pairs, other=0)
        length = (t1 - t0).to(tl.int32)
        acc = tl.zeros((BM, BN), tl.float32)
        t = tl.zeros((), tl.int32)
        p = tl.zeros((), tl.int32)
        for _ in range(0, n_pairs * tl.cdiv(length, BK)):
            word = _pick(words, lane, p)
            r = (word >> 48 & 0x7FFF).to(tl.int32) * SLAB_ROWS + (i ^ (word & 0xFFFF).to(tl.int32))
            c = (word >> 32 & 0xFFFF).to(tl.int32) * SLAB_COLS + (j ^ (word >> 16 & 0xFFFF).to(tl.int32))
            r = tl.max_contiguous(tl.multiple_of(r, 8), 8)
            c = tl.max_contiguous(tl.multiple_of(c, 8), 8)
            live = token < length - t
            inside = c < cols
            if SLAB_COLS < BN:
                inside = inside & (j < SLAB_COLS)
            at = t0 + t + token
            x = tl.load(
                d + at[None, :] * stride_d + r[:, None], mask=live[None, :] & (r < rows)[:, None], other=0.0
            )
            y = tl.load(
                a + at[:, None] * stride_a + c[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            # A load, so that the compiler can move the operand's change of layout up to the loads: an arithmetic
            # expression here sends every tile through shared memory once more.
            sign = tl.load(row_sign + tl.where(word < 0, padded_rows, 0) + r)
            x = x * sign[:, None]
            acc = tl.dot(x, y, acc, input_precision="ieee")
            t += BK
            done = t >= length
            p += done.to(tl.int32)
            t = tl.where(done, 0, t)
        keep = (j < SLAB_COLS)[None, :] & (i >= 0)[:, None]
        place = i[:, None] * SLAB_COLS + j[None, :]
        target = partial + ((slot * groups + group) * n_slabs + slab) * SLAB
        if ALWAYS:
            tl.store(target + place, acc, mask=keep)
        else:
            alone = slot < 0
            target = tl.where(alone, out + (segment * n_slabs + slab) * SLAB, target) + place
            tl.store(target, tl.load(target, mask=keep & alone, other=0.0) + acc, mask=keep)


def sketch_linear(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """``out[s] += S vec(sum_t d[t]^T a[t])`` for folded operands on one device; ``offsets`` int64 on that device."""
    d, a = _native.rows_view(d), _native.rows_view(a)
    if d.dtype != a.dtype:
        wide = torch.promote_types(d.dtype, a.dtype)
        d, a = d.to(wide), a.to(wide)
    n_tokens, n_segments = d.shape[0], offsets.numel() - 1
    if n_tokens == 0 or n_segments == 0:
        return
    tables = matrix_tables(plan, d.device)
    if plan.col_fold is None:
        a = fold_columns(a, tables.col_sign, tables.col_fold, plan.folded_cols)
    row_sign = slab_row_signs(plan, d.device, d.dtype)
    config = slab_config(plan.slab_cols, d.dtype, _gpu.has_warp_group_products(d.device))
    # Many slabs fill the device, their partial results its memory.
    chunk = CHUNK_TOKENS * min(16, plan.n_slabs)
    groups = triton.cdiv(tables.most_pairs, group_pairs(plan.slab_cols))
    always = groups > 1 or config.BN > 128  # a tile that wide has no registers left to add to what is there
    slots = n_slots(n_tokens, n_segments, chunk, always)
    partial = torch.empty(slots, groups, out.shape[1], dtype=torch.float32, device=d.device)
    parts = plan.slab_rows // config.BM * triton.cdiv(plan.slab_cols, config.BN)
    with _gpu.on(d):
        slab_kernel[(n_items(n_tokens, n_segments, chunk) * plan.n_slabs * groups * parts,)](
            d, a, out, partial, offsets, tables.pairs, tables.first, row_sign,
            n_segments, n_tokens, plan.folded_rows, plan.folded_cols, row_sign.shape[1], d.stride(0), a.stride(0),
            plan.n_slabs, groups, triton.cdiv(tables.most_pairs, groups),
            SLAB_ROWS=plan.slab_rows, SLAB_COLS=plan.slab_cols, CHUNK=chunk,
            ALWAYS=always, SEGMENTS=SEGMENT_BLOCK,
            PAIRS=_triton.next_power_of_two(triton.cdiv(tables.most_pairs, groups)), **dataclasses.asdict(config),
        )  # fmt: skip
    reduce_partials(partial, out, offsets, n_tokens, chunk, groups, always)
