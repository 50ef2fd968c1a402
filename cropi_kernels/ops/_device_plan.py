"""A plan's tables on a device: uploaded once per (plan, device), in the form that the kernels read."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from ..plan import MatrixPlan, VectorPlan

SIGN_BIT = 63
_ROW_BITS, _COL_BITS = 15, 16  # of the block numbers in a pair's word


@dataclasses.dataclass(frozen=True)
class MatrixTables:
    """``by_pair`` int64 [row blocks, col blocks]: a block pair's draw in one word. Bits 0-15 row XOR, 16-31 column XOR,
    32-47 slab, 63 set where the pair sign is -1. Signs are int8, folds int32.
    """

    by_pair: torch.Tensor
    row_sign: torch.Tensor
    col_sign: torch.Tensor
    row_fold: torch.Tensor
    col_fold: torch.Tensor


@dataclasses.dataclass(frozen=True)
class VectorTables:
    """For each number of the sketch that is hit, where from: ``source`` int32 [depth, hits], -1 for none."""

    position: torch.Tensor
    source: torch.Tensor
    sign: torch.Tensor


T = TypeVar("T")
cache: weakref.WeakKeyDictionary[object, dict[object, object]] = weakref.WeakKeyDictionary()


def cached(plan: object, device: torch.device, build: Callable[[], T], what: object = None) -> T:
    if (of_plan := cache.get(plan)) is None:
        of_plan = cache[plan] = {}
    key = (device, what)  # a tensor's device always has its index
    if key not in of_plan:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first call with a plan uploads its tables, which a CUDA graph cannot record: run the step once "
                "before capturing it"
            )
        of_plan[key] = build()
        if device.type == "cuda":  # once per plan: a later call may come on another stream
            torch.cuda.current_stream(device).synchronize()
    return of_plan[key]  # type: ignore[return-value]


def matrix_tables(plan: MatrixPlan, device: torch.device) -> MatrixTables:
    return cached(plan, device, lambda: _build_matrix(plan, device))


def vector_tables(plan: VectorPlan, device: torch.device) -> VectorTables:
    return cached(plan, device, lambda: _build_vector(plan, device))


def slab_row_signs(plans: tuple[MatrixPlan, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[2, row blocks * slab rows] in the operands' dtype: the signs that the slab applies to the rows of matrices one
    above the other, and their opposites (for pairs whose own sign is -1). 1 and -1 where a fold has applied them."""

    def build() -> torch.Tensor:
        signs = []
        for plan in plans:
            sign = np.ones(plan.n_row_blocks * plan.slab_rows, np.float32)
            if plan.row_fold is None:
                sign[: plan.rows] = plan.row_sign
            signs.append(sign)
        sign = np.concatenate(signs)
        return torch.from_numpy(np.stack([sign, -sign])).to(device, dtype)

    return cached(plans[0], device, build, ("row signs", plans[1:], dtype))


def column_flips(plans: tuple[MatrixPlan, ...]) -> np.ndarray:
    """int32 [pairs, 8], by row block and column block of matrices one above the other whose columns have signs: bit k
    of number e is set where a block pair adds a column whose sign is -1 to column ``8 k + e`` of the slab."""
    parts = []
    for plan in plans:
        sign = np.ones(plan.n_col_blocks * plan.slab_cols, np.float32)
        sign[: plan.cols] = plan.col_sign
        column = np.arange(plan.n_col_blocks)[:, None] * plan.slab_cols + (
            np.arange(plan.slab_cols) ^ plan.pair_col.astype(np.int64)[..., None]
        )
        negative = (sign[column] < 0).reshape(-1, plan.slab_cols // 8, 8)
        parts.append(
            (negative << np.arange(plan.slab_cols // 8, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32)
        )
    return np.concatenate(parts).view(np.int32)


def pair_words(plans: tuple[MatrixPlan, ...]) -> np.ndarray:
    """uint64 [pairs]: row XOR, column XOR, column block, row block and sign of the block pairs of matrices one above
    the other, by row block and column block, in the bits that `slab_kernel` takes apart.

    Raises:
        ValueError: more blocks than a word has bits for.
    """
    words, begin = [], 0
    for plan in plans:
        if begin + plan.n_row_blocks > 1 << _ROW_BITS or plan.n_col_blocks > 1 << _COL_BITS:
            raise ValueError(
                f"{plan.name} [{plan.rows}, {plan.cols}] has {plan.n_row_blocks} x {plan.n_col_blocks} blocks; the GPU "
                f"kernels address {1 << _ROW_BITS} x {1 << _COL_BITS}: fold it, or use backend='reference'"
            )
        row_block, col_block = (_wide(block) for block in np.indices(plan.pair_row.shape))
        row_block += np.uint64(begin)
        words.append(_draw(plan) | col_block << np.uint64(32) | row_block << np.uint64(48))
        begin += plan.n_row_blocks
    return np.concatenate([word.reshape(-1) for word in words])


def what_d_is_of(slab_rows: int) -> int:
    """The bits of a pair's word that say which tiles of D it has: those of the row block, and of the row XOR all but
    the one that only swaps the halves of a slab.

    Without a fold a row block has many pairs, which differ in few of these bits. A program that takes those with equal
    bits one after another may keep their tiles: of 35 pairs it brings 8, and a quarter less of both operands.
    """
    return 0x7FFF << 48 | 0xFFFF & ~(slab_rows // 2)


def _draw(plan: MatrixPlan) -> np.ndarray:
    draw: np.ndarray = _wide(plan.pair_row) | _wide(plan.pair_col) << np.uint64(16)
    return draw | _wide(plan.pair_sign < 0) << np.uint64(SIGN_BIT)


def _wide(table: Any) -> np.ndarray:
    return np.ascontiguousarray(table).astype(np.uint64)


def upload(table: np.ndarray, dtype: Any, device: torch.device) -> torch.Tensor:
    copied: np.ndarray = np.array(table, dtype=dtype, order="C")  # a copy: plans are read-only
    return torch.from_numpy(copied).to(device)


def _build_matrix(plan: MatrixPlan, device: torch.device) -> MatrixTables:
    no_fold = np.zeros(1, np.uint32)
    by_pair = (_draw(plan) | _wide(plan.pair_slab) << np.uint64(32)).view(np.int64)
    return MatrixTables(
        by_pair=upload(by_pair, np.int64, device),
        row_sign=upload(plan.row_sign, np.int8, device),
        col_sign=upload(plan.col_sign, np.int8, device),
        row_fold=upload(no_fold if plan.row_fold is None else plan.row_fold, np.int32, device),
        col_fold=upload(no_fold if plan.col_fold is None else plan.col_fold, np.int32, device),
    )


def _build_vector(plan: VectorPlan, device: torch.device) -> VectorTables:
    places = plan.position
    order = np.argsort(places, kind="stable")
    position, start, count = np.unique(places[order], return_index=True, return_counts=True)
    depth = np.arange(int(count.max()))[:, None]
    source = np.where(depth < count, order[np.minimum(start + depth, plan.size - 1)], -1)
    return VectorTables(
        position=torch.from_numpy(position).to(device),
        source=torch.from_numpy(source.astype(np.int32)).to(device),
        sign=upload(plan.sign, np.int8, device),
    )
