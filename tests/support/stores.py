"""Stores of made-up rows, and what a store holds, to compare two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi.ranking.scores import Scores
from cropi.store.memory import MemoryStore
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore


def in_memory(
    vectors: Any,
    ids: str | Sequence[str],
    sets: Sequence[str] | None = None,
    *,
    skipped: str = "equal rewards",
    **manifest: Any,
) -> MemoryStore:
    """A store of these rows, [n, dim]; a row of zeros is a prompt that was skipped, and why.

    ``ids``: the prompts', or what they begin with, before a number.
    """
    store = MemoryStore({"spec": {"dim": vectors.shape[1]}} | manifest)
    _add(store, vectors, ids, sets, skipped)
    store.finish()
    return store


def on_disk(
    path: Path, vectors: Any, ids: str | Sequence[str], sets: Sequence[str] | None = None, **manifest: Any
) -> SketchStore:
    """The same in files, of seven rows each."""
    given = {
        "spec": {"dim": vectors.shape[1]}, "hash_version": 1, "stage": "0", "parameters": {}, "dtype": "float32",
        "model": {"dtype": "float32", "weights": "aa"},
    }  # fmt: skip
    with SketchStore.create(path, given | manifest, shard_rows=7) as store:
        _add(store, vectors, ids, sets, "equal rewards")
    return SketchStore.open(path)


def _add(
    store: Any, vectors: Any, ids: str | Sequence[str], sets: Sequence[str] | None, skipped: str
) -> None:
    for i, vector in enumerate(torch.as_tensor(vectors, dtype=torch.float32)):
        name, of_set = f"{ids}{i:03d}" if isinstance(ids, str) else ids[i], None if sets is None else sets[i]
        if bool(vector.any()):
            store.add(RowInfo(name, set=of_set, norm=float(vector.norm())), vector)
        else:
            store.add(RowInfo(name, "skipped", skipped, set=of_set))


def sketches_of(store: Path | SketchStore) -> dict[str, torch.Tensor]:
    """The sketch of every prompt that has one."""
    if isinstance(store, Path):
        store = SketchStore.open(store)
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


def table_of(
    values: Any, tasks: str = "", files: str = "", stderr: Any = None, p_selected: Any = None
) -> Scores:
    """Prompts 00, 01, ... with scores, a letter of ``tasks`` and one of ``files`` each."""
    table = np.asarray(values, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    rows = [
        RowInfo(f"{i:02d}", task=tasks[i : i + 1] or None, extra={"file": files[i]} if files else {})
        for i in range(len(table))
    ]
    sets = [f"s{v}" for v in range(table.shape[1])]
    held = [{"name": name, "prompts": 9} for name in sets]
    meta = {} if stderr is None else {"uncertainty": {"sets": held}}
    error = None if stderr is None else np.asarray(stderr, dtype=float).reshape(table.shape)
    return Scores(rows, sets, table, meta, error, None if p_selected is None else np.asarray(p_selected))
