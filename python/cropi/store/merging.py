"""Several stores of one model and stage, written as one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, shown
from cropi.files import is_there, path_of
from cropi.form import nested
from cropi.store.compact import SHARD_BYTES, filled, join_blocks
from cropi.store.differences import ALIKE, UnlikeStores, first_difference
from cropi.store.manifest import MANIFEST, MERGED, NOTES
from cropi.store.rows import RowInfo
from cropi.store.shards import Shard
from cropi.store.store import SketchStore


def merge(
    out: str | Path, stores: Sequence[SketchStore | str | Path], *, shard_bytes: int = SHARD_BYTES
) -> SketchStore:
    """Copy the rows of several stores into one; the stored numbers stay as they are.

    Killed at any instant, the same call goes on: rows that ``out`` holds are not copied again. The stores stay as they
    are.

    Args:
        out: the folder of the new store.
        stores: those to merge, or their folders.
        shard_bytes: about the size of a file of the new store.

    Returns:
        The new store, open for reading.

    Raises:
        CropiError: no store is given; ``out`` is one of them, or holds rows that none of them holds; one is
            unfinished; they differ in spec, model, stage, estimator, tokenizer, template, temperature or dtype; two
            hold one prompt; or the disk is full.
    """
    parts = [one if isinstance(one, SketchStore) else SketchStore.open(one) for one in stores]
    with warnings.catch_warnings():  # what is a warning to a reader is an error below
        warnings.simplefilter("ignore", UnlikeStores)
        whole = SketchStore.join(parts)
    folder = path_of(out, "out", "a new folder")
    for part in parts:
        if os.path.realpath(folder) == os.path.realpath(part.path):
            raise CropiError(f"{out} is one of the stores that are merged; give a new folder")
        part.check_finished(alone=False)
    whole.check_finished()
    manifest = merged_manifest(parts)
    if is_there(folder / MANIFEST):  # before `create` notes how many rows there are to be
        _check_rows(SketchStore.open(folder), whole)
    with SketchStore.create(folder, manifest, shard_bytes=shard_bytes) as store:
        _check_rows(store, whole)  # another process may have merged others there since
        copy_rows(store, whole.files())
        store.finish()
    return SketchStore.open(folder)


def _check_rows(made: SketchStore, whole: SketchStore) -> None:
    """Check that a store holds no row but those that are merged into it."""
    for row in made.rows():
        if row.id not in whole:
            raise CropiError(
                f"{made.path} holds the prompt {shown(row.id)}, which none of the stores that are merged holds: other "
                "stores were merged there; give a new folder"
            )


def copy_rows(
    store: SketchStore,
    shards: Sequence[Shard],
    wanted: Callable[[RowInfo], bool] = lambda row: True,
    changed: Callable[[RowInfo], RowInfo] = lambda row: row,
) -> None:
    """Copy rows into a store, in shards as large as the store's, the stored numbers as they are.

    Args:
        store: open for writing. Rows that it has already are left out, so that a call that was killed goes on.
        shards: where the rows are.
        wanted: which rows are copied.
        changed: what the store is told of a row.
    """
    for group in filled(shards, store.shard_bytes):
        rows = [row for shard in group for row in shard.rows]
        left = [wanted(row) and row.id not in store for row in rows]
        if any(left):
            kept, tensors = _left_rows(rows, join_blocks(group), left)
            store.append([changed(row) for row in kept], tensors)


def _left_rows(
    rows: Sequence[RowInfo], tensors: Mapping[str, torch.Tensor], left: Sequence[bool]
) -> tuple[list[RowInfo], Mapping[str, torch.Tensor]]:
    """The rows that are not copied yet."""
    if not all(left):
        kept = torch.tensor(
            [one for row, one in zip(rows, left, strict=True) if row.row is not None], device="cpu"
        )
        tensors = {name: tensor[kept] for name, tensor in tensors.items()}
    return [row for row, one in zip(rows, left, strict=True) if one], tensors


def merged_manifest(stores: Sequence[SketchStore]) -> dict[str, Any]:
    """The manifest of all together. What differs, and may (trajectories, set, behaviour, lengths), is null.

    Raises:
        CropiError: what may not differ does; the field is named with both values.
    """
    first = stores[0]
    for store in stores[1:]:
        for field in (*ALIKE, "dtype"):
            left, right = (nested(one.manifest, field) for one in (first, store))
            differs = first_difference(left, right, field)
            if differs:
                raise CropiError(
                    f"{first.path} and {store.path} cannot be merged: {differs.text()}; sketch both with the same "
                    "settings, or give both to `cropi influence --train`, which reads several stores as one"
                )
    held = [{k: v for k, v in one.manifest.items() if k not in NOTES} for one in stores]
    made: dict[str, Any] = _common(held)
    # They agree on the model, of which some may say more than others.
    known = [one["model"] for one in held if isinstance(one.get("model"), Mapping)]
    if known:
        made["model"] = max(known, key=lambda model: len(model))
    made[MERGED] = [store.manifest.get("trajectories") for store in stores]
    made["notes"] = dict(first.manifest.get("notes", {})) | {"merged": [str(store.path) for store in stores]}
    return made | {"prompts": sum(len(store) for store in stores)}


def _common(values: Sequence[Any]) -> Any:
    """What JSON values have in common: the value itself, a table of its common fields, or None."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, Mapping) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _common([value.get(key) for value in values]) for key in keys}
    return None
