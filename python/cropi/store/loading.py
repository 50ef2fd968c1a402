"""Which shards of a folder count, and the rows that they hold."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path

from cropi.errors import CropiError
from cropi.files import entries, reading, writing
from cropi.sealed import SUMS, sums_path
from cropi.store.rows import RowInfo
from cropi.store.shards import Shard, damaged, read_shard, shard_number

_ID = attrgetter("id")
Loaded = tuple[dict[Path, Shard], dict[str, RowInfo]]


def load_steady(folder: Path, job: str) -> Loaded:
    """:func:`load`, again where a job that writes to the store joined shards meanwhile.

    Raises:
        CropiError: as :func:`load`, or the store keeps changing.
    """
    for _ in range(8):
        names = _names(folder)
        try:
            loaded = load(folder, job)
        except FileNotFoundError:
            continue
        if _names(folder) == names:
            return loaded
    raise CropiError(
        f"the shards of {folder} change while they are read: a job writes to it; run this again later"
    )


def load(folder: Path, job: str, *, clean: bool = False) -> Loaded:
    """The shards that count, by path in the order of their numbers, and all rows by id.

    Args:
        folder: of the store.
        job: the fingerprint of its manifest.
        clean: remove what a killed job left behind; for the process that holds the lock.

    Raises:
        CropiError: a shard is damaged, belongs to another store, or holds a prompt that another one holds.
        FileNotFoundError: a shard went while they were read.
    """
    with _without_collection():
        return _load(folder, job, clean)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Millions of rows are made, and none is garbage: looking for some would take longer than all the rest."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _load(folder: Path, job: str, clean: bool) -> Loaded:
    # As a shard's path is: what is not among those that count is removed below.
    folder = folder.absolute()
    present = _names(folder)
    paths = sorted((folder / name for name in present if name.endswith(".safetensors")), key=shard_number)
    committed = [read_shard(path, job) for path in paths if sums_path(path).name in present]
    replaced = {number for shard in committed for number in shard.replaces}
    unfinished = [
        path for path in paths if sums_path(path).name not in present and shard_number(path) not in replaced
    ]
    for path in unfinished:
        if path is not paths[-1]:
            raise CropiError(damaged(path, "its checksum file is missing"))
    shards: dict[Path, Shard] = {}
    rows: dict[str, RowInfo] = {}
    for shard in committed:
        if shard_number(shard.path) in replaced:  # the job was killed before it removed what it had joined
            continue
        before = len(rows)
        rows.update(zip(map(_ID, shard.rows), shard.rows, strict=True))
        if len(rows) < before + len(shard.rows):
            _name_twice(shard, shards)
        shards[shard.path] = shard
    for shard in committed:
        if shard.path not in shards and any(row.id not in rows for row in shard.rows):
            raise CropiError(
                f"the shard {shard.path} holds other prompts than the one that took over its rows: it was copied "
                "there; take it and its .sha256 out of the folder"
            )
    if clean:
        with writing(folder):
            _clean(folder, present, [path for path in paths if path not in shards])
    return shards, rows


def remove(path: Path) -> None:
    """Remove a shard whose rows are elsewhere, or that was never finished."""
    # The shard first: without its commit it could be taken for one that was never finished.
    path.unlink(missing_ok=True)
    sums_path(path).unlink(missing_ok=True)


def _names(folder: Path) -> set[str]:
    with reading(folder):
        return {name for name in os.listdir(folder) if name.startswith("shard-")}


def _clean(folder: Path, present: set[str], gone: list[Path]) -> None:
    for path in gone:
        remove(path)
    for name in present:
        if name.endswith(SUMS) and name.removesuffix(SUMS) not in present:
            (folder / name).unlink(missing_ok=True)  # killed between the two removals
    for left in entries(folder, ".*.tmp"):
        left.unlink()


def _name_twice(shard: Shard, others: Mapping[Path, Shard]) -> None:
    seen = {row.id for other in others.values() for row in other.rows}
    for row in shard.rows:
        if row.id in seen:
            raise CropiError(
                f"the shard {shard.path} holds the prompt {row.id!r}, and so does another shard of "
                f"{shard.path.parent}: one of them is a copy; take it and its .sha256 out of the folder"
            )
        seen.add(row.id)
