"""Triton kernel behind `sketch_embedding`: the scatter of rows as a product with a one-hot matrix.

A program owns a tile of a slab and walks the tokens of its chunk, so that rows that fall on one place are added in
order, without atomics. The product is exact: one operand holds 0, 1 and -1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ... import _native
from ..._launch import Launch
from ..._triton import ceil_div
from ...plan import MatrixPlan
from .._device_plan import cached, matrix_tables
from .._triton_segments import chunk_of, cut, reduce_partials

CHUNK_TOKENS = 256


@triton.jit(do_not_specialize=["vocabulary", "folded_rows", "col_blocks", "n_segments", "n_slabs"])
def rows_kernel(
    x,  # [tokens, cols], rows stride_x apart
    ids,  # int64 [tokens]
    out,  # float32 [segments, n_slabs * SLAB]
    partial,  # float32 [slots, n_slabs * SLAB]
    table,  # of the chunks
    by_pair,  # int64 [row blocks, col_blocks], see MatrixTables
    row_sign,  # int8 [vocabulary]
    row_fold,  # int32 [vocabulary / folded_rows]
    col_sign,  # int8 [cols], as `column_signs`
    cols,
    stride_x,
    vocabulary,
    folded_rows,
    col_blocks,
    n_segments,
    n_slabs,
    SLAB_ROWS: tl.constexpr,
    SLAB_COLS: tl.constexpr,
    FOLDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    COL_PARTS: tl.constexpr = (SLAB_COLS + BN - 1) // BN
    PARTS: tl.constexpr = (SLAB_ROWS // BM) * COL_PARTS
    SLAB: tl.constexpr = SLAB_ROWS * SLAB_COLS
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % PARTS).to(tl.int32)
    slab = pid // PARTS % n_slabs
    segment, t0, t1, slot = chunk_of(table, pid // PARTS // n_slabs)
    if segment < n_segments:
        i = part // COL_PARTS * BM + tl.arange(0, BM)
        j = part % COL_PARTS * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, tl.cdiv((t1 - t0).to(tl.int32), BK)):
            t = t0 + step * BK + tl.arange(0, BK)
            row = tl.load(ids + t, mask=t < t1, other=0)
            known = (row >= 0) & (row < vocabulary)
            sign = tl.load(row_sign + row, mask=known, other=0).to(tl.float32)
            sign = tl.where(known, sign, float("nan"))  # a row that does not exist must not pass unseen
            if FOLDED:
                row = row % folded_rows ^ tl.load(row_fold + row // folded_rows, mask=known, other=0)
            row = tl.where(known, row, 0)
            for block in range(0, col_blocks):
                word = tl.load(by_pair + row // SLAB_ROWS * col_blocks + block)
                mine = (t < t1) & ((word >> 32 & 0xFFFF) == slab)
                c = block * SLAB_COLS + (j[None, :] ^ (word >> 16 & 0xFFFF).to(tl.int32)[:, None])
                c = tl.max_contiguous(tl.multiple_of(c, [1, 8]), [1, 8])
                inside = mine[:, None] & (c < cols)
                if SLAB_COLS < BN:
                    inside = inside & (j < SLAB_COLS)[None, :]
                y = tl.load(x + t[:, None] * stride_x + c, mask=inside, other=0.0)
                y = y * tl.load(col_sign + c, mask=inside, other=0).to(y.dtype)
                to = ((row % SLAB_ROWS).to(tl.int32) ^ (word & 0xFFFF).to(tl.int32))[None, :]
                signed = tl.where(mine, tl.where(word < 0, -sign, sign), 0.0)
                hot = tl.where(i[:, None] == to, signed[None, :], 0.0).to(y.dtype)
                acc = tl.dot(hot, y, acc, input_precision="ieee")
        alone = slot < 0
        target = tl.where(
            alone, out + (segment * n_slabs + slab) * SLAB, partial + (slot * n_slabs + slab) * SLAB
        )
        target = target + (i[:, None] * SLAB_COLS + j[None, :])
        keep = (j < SLAB_COLS)[None, :] & (i >= 0)[:, None]
        tl.store(target, tl.load(target, mask=keep & alone, other=0.0) + acc, mask=keep)


def tile(slab_cols: int, exact: bool) -> dict[str, int]:
    """``exact``: of float32 numbers. On compute capability 10, Triton 3.7.1 multiplies tiles of 64 rows or more of them
    as tf32, whatever `tl.dot` is told."""
    rows, tokens, warps = (32, 16, 4) if exact else (128, 32, 8)
    return {"BM": rows, "BN": min(64, max(16, slab_cols)), "BK": tokens, "num_warps": warps}


@functools.cache
def rows_launch(slab_rows: int, slab_cols: int, folded: bool, exact: bool) -> Launch:
    shape = tile(slab_cols, exact) | {"SLAB_ROWS": slab_rows, "SLAB_COLS": slab_cols}
    return Launch(rows_kernel, FOLDED=folded, num_stages=2, **shape)


def sketch_embedding(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """``out[s] += S vec(sum_t onehot(rows[t])^T x[t])``, for ``x`` with folded columns where the plan folds them; a
    row id out of range makes its segment NaN."""
    x, rows = _native.rows_view(x), rows.contiguous()
    n_tokens, n_segments = x.shape[0], offsets.numel() - 1
    if n_tokens == 0 or n_segments == 0:
        return
    tables = matrix_tables(plan, x.device)
    chunks = cut(offsets, n_tokens, CHUNK_TOKENS * min(16, plan.n_slabs), always=False)
    partial = torch.empty(chunks.n_slots, out.shape[1], dtype=torch.float32, device=x.device)
    signs = tables.row_sign, tables.row_fold, column_signs(plan, x.device)
    exact = x.dtype == torch.float32
    shape = tile(plan.slab_cols, exact)
    parts = plan.slab_rows // shape["BM"] * ceil_div(plan.slab_cols, shape["BN"])
    rows_launch(plan.slab_rows, plan.slab_cols, plan.row_fold is not None, exact)(
        (chunks.n_items * plan.n_slabs * parts,),
        (x, rows, out, partial, chunks.table, tables.by_pair, *signs),
        (plan.folded_cols, x.stride(0)),
        (plan.rows, plan.folded_rows, plan.n_col_blocks, n_segments, plan.n_slabs),
    )
    reduce_partials(partial, out, chunks, 1)


def column_signs(plan: MatrixPlan, device: torch.device) -> torch.Tensor:
    """int8 [folded cols]: 1 where a fold has applied them."""
    if plan.col_fold is None:
        return matrix_tables(plan, device).col_sign
    ones = functools.partial(torch.ones, plan.folded_cols, dtype=torch.int8, device=device)
    return cached(plan, device, ones, "column signs, applied")
