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
    """``pairs`` int64 [pairs], sorted by slab: block pair and its draw in one word, so that a step loads one number.

    Bits 0-15 row XOR, 16-31 column XOR, 32-47 column block, 48-62 row block, 63 set where the pair sign is -1.
    ``first`` int32 [slabs + 1]: pairs ``first[q] .. first[q + 1]`` go to slab q. ``by_pair`` int64 [row blocks, col
    blocks] is the same word by position, with the slab in place of the block numbers (bits 32-47).
    Signs are int8, folds int32.
    """

    pairs: torch.Tensor
    first: torch.Tensor
    by_pair: torch.Tensor
    row_sign: torch.Tensor
    col_sign: torch.Tensor
    row_fold: torch.Tensor
    col_fold: torch.Tensor
    most_pairs: int  # of one slab


@dataclasses.dataclass(frozen=True)
class VectorTables:
    """For each number of the sketch that is hit, where from: ``source`` int32 [depth, hits], -1 for none."""

    position: torch.Tensor
    source: torch.Tensor
    sign: torch.Tensor


T = TypeVar("T")
_cache: weakref.WeakKeyDictionary[object, dict[object, object]] = weakref.WeakKeyDictionary()


def _cached(plan: object, device: torch.device, build: Callable[[], T], what: object = None) -> T:
    of_plan = _cache.setdefault(plan, {})
    key = (str(device), what)  # a tensor's device always has its index
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
    return _cached(plan, device, lambda: _build_matrix(plan, device))


def vector_tables(plan: VectorPlan, device: torch.device) -> VectorTables:
    return _cached(plan, device, lambda: _build_vector(plan, device))


def slab_row_signs(plan: MatrixPlan, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[2, row blocks * slab rows] in the operands' dtype: the signs that the slab applies to the rows, and their
    opposites (for pairs whose own sign is -1). All 1 and -1 where the fold has applied the row signs."""

    def build() -> torch.Tensor:
        sign = np.ones(-(-plan.n_row_blocks * plan.slab_rows // 16) * 16, np.float32)
        if plan.row_fold is None:
            sign[: plan.rows] = plan.row_sign
        return torch.from_numpy(np.stack([sign, -sign])).to(device, dtype)

    return _cached(plan, device, build, dtype)


def pair_words(plan: MatrixPlan) -> np.ndarray:
    """uint64 [row blocks, col blocks], the bits of `MatrixTables.pairs`.

    Raises:
        ValueError: more blocks than a word has bits for.
    """
    if plan.n_row_blocks > 1 << _ROW_BITS or plan.n_col_blocks > 1 << _COL_BITS:
        raise ValueError(
            f"{plan.name} [{plan.rows}, {plan.cols}] has {plan.n_row_blocks} x {plan.n_col_blocks} blocks; the GPU "
            f"kernels address {1 << _ROW_BITS} x {1 << _COL_BITS}: fold it, or use backend='reference'"
        )
    row_block, col_block = (_wide(block) for block in np.indices(plan.pair_row.shape))
    words: np.ndarray = _draw(plan) | col_block << np.uint64(32) | row_block << np.uint64(48)
    return words


def _draw(plan: MatrixPlan) -> np.ndarray:
    draw: np.ndarray = _wide(plan.pair_row) | _wide(plan.pair_col) << np.uint64(16)
    return draw | _wide(plan.pair_sign < 0) << np.uint64(SIGN_BIT)


def _wide(table: Any) -> np.ndarray:
    return np.ascontiguousarray(table).astype(np.uint64)


def _build_matrix(plan: MatrixPlan, device: torch.device) -> MatrixTables:
    words = pair_words(plan).reshape(-1)
    slab = plan.pair_slab.reshape(-1).astype(np.int64)
    order = np.argsort(slab, kind="stable")
    counts = np.bincount(slab, minlength=plan.n_slabs)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    no_fold = np.zeros(1, np.uint32)

    def put(table: np.ndarray, dtype: type) -> torch.Tensor:
        # A copy: plans are read-only.
        copied: np.ndarray = np.array(table, dtype=dtype, order="C")
        return torch.from_numpy(copied).to(device)

    return MatrixTables(
        pairs=put(words[order].view(np.int64), np.int64),
        first=put(first, np.int32),
        by_pair=put((_draw(plan) | _wide(plan.pair_slab) << np.uint64(32)).view(np.int64), np.int64),
        row_sign=put(plan.row_sign, np.int8),
        col_sign=put(plan.col_sign, np.int8),
        row_fold=put(no_fold if plan.row_fold is None else plan.row_fold, np.int32),
        col_fold=put(no_fold if plan.col_fold is None else plan.col_fold, np.int32),
        most_pairs=int(counts.max()),
    )


def _build_vector(plan: VectorPlan, device: torch.device) -> VectorTables:
    order = np.argsort(plan.position, kind="stable")
    position, start, count = np.unique(plan.position[order], return_index=True, return_counts=True)
    depth = np.arange(int(count.max()))[:, None]
    source = np.where(depth < count, order[np.minimum(start + depth, plan.size - 1)], -1)
    return VectorTables(
        position=torch.from_numpy(position).to(device),
        source=torch.from_numpy(source.astype(np.int32)).to(device),
        sign=torch.from_numpy(plan.sign.astype(np.int8)).to(device),
    )
