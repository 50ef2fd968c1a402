"""What a store holds, to compare two of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cropi.store.store import SketchStore


def sketches_of(store: SketchStore) -> dict[str, torch.Tensor]:
    """The sketch of every prompt that has one."""
    return {row.id: vector for rows, table in store.shards() for row, vector in zip(rows, table.clone())}


def content(store: Path | SketchStore) -> dict[str, tuple[Any, ...]]:
    """Every row by its prompt: all that is known of it but its place, and its sketch or None."""
    if isinstance(store, Path):
        store = SketchStore.open(store)
    sketches = sketches_of(store)
    return {row.id: (*asdict(replace(row, row=None)).values(), sketches.get(row.id)) for row in store.rows()}


def equal(one: dict[str, tuple[Any, ...]], other: dict[str, tuple[Any, ...]]) -> bool:
    """Whether two stores hold the same rows, bit by bit."""
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    vectors = one[-1] is other[-1] is None or torch.equal(one[-1], other[-1])
    return one[:-1] == other[:-1] and vectors
