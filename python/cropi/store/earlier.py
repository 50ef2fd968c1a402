"""Rows that a stage keeps from the stages before it, in a store beside that of the prompts that it sketched itself.

Each of them says by ``scored_at`` in which stage its sketch was made. Their store goes by the name of the present stage
and model, so that it can be read as one with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cropi.errors import CropiError
from cropi.files import is_folder
from cropi.store.manifest import NOTES, SCALED
from cropi.store.merging import copy_rows
from cropi.store.rows import SCORED_AT, RowInfo
from cropi.store.store import SketchStore

EARLIER = "earlier"  # the store's folder


def open_together(paths: Sequence[Path]) -> SketchStore | None:
    """Those of the stores that exist, read as one; None where none does.

    Raises:
        CropiError: one is unfinished, or they do not belong together.
    """
    stores = [SketchStore.open(path) for path in paths if is_folder(path)]
    for store in stores:
        store.check_finished(alone=False)
        if store.dtype != stores[0].dtype:
            raise CropiError(
                f"{stores[0].path} was stored as {stores[0].dtype}, and {store.path} as {store.dtype}: a stage keeps "
                "rows of those before it as they are; give all stages one --store-dtype"
            )
    return SketchStore.join(stores) if stores else None


def scored_at(store: SketchStore, row: RowInfo) -> str:
    """The stage in which a row's sketch was made."""
    return str(row.extra.get(SCORED_AT, store.manifest["stage"]))


def keep_earlier(
    folder: Path, earlier: SketchStore | None, rows: Mapping[str, RowInfo], present: Mapping[str, Any]
) -> SketchStore:
    """Write the store of kept rows. Killed at any instant, the same call goes on.

    Args:
        folder: of the new store.
        earlier: the training prompts' store of the stage before; None in the first.
        rows: what is known now of every prompt that is not sketched anew, by id; what has no sketch in ``earlier`` is
            written as it is.
        present: the manifest of a validation store of the present stage.

    Returns:
        The store, open for reading.
    """
    made = present if earlier is None else earlier.manifest
    manifest = {key: value for key, value in made.items() if key not in (*NOTES, "set", SCALED)}
    manifest |= {"stage": present["stage"], "model": present["model"], "prompts": len(rows)}
    manifest["notes"] = {"earlier": [] if earlier is None else [str(path) for path in earlier.paths]}
    with SketchStore.create(folder, manifest) as store:
        if earlier is not None:
            copy_rows(
                store,
                earlier.files(),
                lambda row: row.row is not None and row.id in rows,
                lambda row: _marked(rows[row.id], row, scored_at(earlier, row)),
            )
        for row in rows.values():
            if row.id not in store:
                store.add(row)
        store.finish()
    return SketchStore.open(folder)


def _marked(now: RowInfo, row: RowInfo, stage: str) -> RowInfo:
    """The earlier row, with what the prompt's record says now."""
    return replace(
        row,
        set=now.set,
        task=now.task,
        pass_rate=now.pass_rate,
        extra={**row.extra, **now.extra, SCORED_AT: stage},
    )
