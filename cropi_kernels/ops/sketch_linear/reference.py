"""The slab sketch as an explicit sparse matrix: the oracle of every kernel, in any float dtype."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ...plan import MatrixPlan


def coordinates(plan: MatrixPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket (int64) and sign (float64) of every coordinate of the [rows, cols] gradient: the whole of S.

    With ``r' = fold(r)``, ``c' = fold(c)``, ``I, i = divmod(r', slab_rows)``, ``J, j = divmod(c', slab_cols)``::

        bucket = slab(I, J) * 32768 + (i ^ row_xor(I, J)) * slab_cols + (j ^ col_xor(I, J))
        sign   = row_sign(r) * col_sign(c) * pair_sign(I, J)
    """
    rows, cols = (torch.arange(size, device="cpu") for size in (plan.rows, plan.cols))  # as the plan's tables
    r, c = rows, cols
    if plan.row_fold is not None:
        fold = torch.from_numpy(plan.row_fold.astype("int64"))
        r = (rows % plan.folded_rows) ^ fold[rows // plan.folded_rows]
    if plan.col_fold is not None:
        fold = torch.from_numpy(plan.col_fold.astype("int64"))
        c = (cols % plan.folded_cols) ^ fold[cols // plan.folded_cols]
    block = (r // plan.slab_rows)[:, None], (c // plan.slab_cols)[None, :]

    def pair(table: object) -> torch.Tensor:
        return torch.from_numpy(table.astype("int64"))[block]  # type: ignore[attr-defined]

    i = (r % plan.slab_rows)[:, None] ^ pair(plan.pair_row)
    j = (c % plan.slab_cols)[None, :] ^ pair(plan.pair_col)
    bucket = pair(plan.pair_slab) * (plan.slab_rows * plan.slab_cols) + i * plan.slab_cols + j
    sign = (
        torch.from_numpy(plan.row_sign).double()[:, None] * torch.from_numpy(plan.col_sign).double()[None, :]
    )
    return bucket, sign * torch.from_numpy(plan.pair_sign).double()[block]


def sketch_matrix(gradient: torch.Tensor, plan: MatrixPlan) -> torch.Tensor:
    """Sketch [n_slabs * 32768] of a gradient [rows, cols] that exists, in the gradient's dtype."""
    bucket, sign = coordinates(plan)
    out = gradient.new_zeros(plan.dim)
    values = gradient * sign.to(gradient)
    return out.index_add_(0, bucket.reshape(-1).to(gradient.device), values.reshape(-1))


def fold_columns(x: torch.Tensor, sign: np.ndarray, offset: np.ndarray, width: int) -> torch.Tensor:
    """``out[:, (c % width) ^ offset[c // width]] += sign[c] * x[:, c]``; half dtypes accumulate in float32."""
    c = torch.arange(x.shape[1], device=x.device)
    to = (c % width) ^ torch.from_numpy(offset.astype("int64")).to(x.device)[c // width]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide.new_zeros(x.shape[0], width).index_add_(1, to, wide * torch.from_numpy(sign).to(wide))
    return out.to(x.dtype)


def sketch_linear(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    """``out[s] += S vec(sum_t d[t]^T a[t])``; ``d`` and ``a`` are already folded where the plan folds.

    The sum runs over tokens ``offsets[s] .. offsets[s + 1]``.
    """
    bucket, sign = folded_coordinates(plan)
    bucket, sign = bucket.reshape(-1).to(out.device), sign.to(out)
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        gradient = d[begin:end].to(out.dtype).T @ a[begin:end].to(out.dtype)
        out[s].index_add_(0, bucket, (gradient * sign).reshape(-1))


def folded_coordinates(plan: MatrixPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates behind the fold: signs that the fold has applied are 1."""
    ones = dataclasses.replace(
        plan,
        rows=plan.folded_rows,
        cols=plan.folded_cols,
        row_sign=plan.row_sign if plan.row_fold is None else plan.row_sign[: plan.folded_rows] * 0 + 1,
        col_sign=plan.col_sign if plan.col_fold is None else plan.col_sign[: plan.folded_cols] * 0 + 1,
        row_fold=None,
        col_fold=None,
    )
    return coordinates(ones)
