"""The sketch store: a folder of shards and a manifest that says what they are sketches of.

This module makes stores, continues and joins them; :mod:`cropi.store.stored` reads what they hold.
Rows are keyed by prompt id. A row is safe once :meth:`SketchStore.flush` has returned: a job that is killed
at any instant resumes at the first missing prompt. A store refuses to be continued, or compared, under other
settings.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cropi.atomic import make_folder, write_atomic
from cropi.errors import CropiError
from cropi.files import is_folder, is_there, path_of, reason, writing
from cropi.locks import LOCK, is_at, lock_folder
from cropi.store.codec import check_dtype, encode
from cropi.store.compact import SHARD_BYTES, due, groups, join_blocks, tail
from cropi.store.differences import check_comparable, check_same_job, warn_unlike
from cropi.store.loading import load, load_steady, remove
from cropi.store.manifest import (
    MANIFEST,
    SCALED,
    job_fingerprint,
    manifest_text,
    new_manifest,
    read_manifest,
)
from cropi.store.rows import RowInfo, check_characters, placed
from cropi.store.shards import Shard, shard_number, write_shard
from cropi.store.shares import joined_share
from cropi.store.stored import StoredSketches


class InUse(CropiError):
    """Another process writes to the store."""


class SketchStore(StoredSketches):
    """Sketches of prompt gradients in a folder.

    Use :meth:`create` to write (it continues a store that is there) and :meth:`open` to read. As a context
    manager it flushes and releases the folder at the end, also after an error.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with SketchStore.create(folder, {"spec": {"dim": 64}, "stage": "0"}) as store:
    ...         _ = store.add(RowInfo("a", norm=8.0), torch.ones(64))
    ...     store = SketchStore.open(folder)
    ...     for rows, sketches in store.shards():
    ...         print([row.id for row in rows], sketches.shape)
    ['a'] torch.Size([1, 64])
    >>> len(store), "b" in store
    (1, False)
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], *, shard_rows: int = 64, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(path, manifest)
        self.shard_rows, self.shard_bytes = shard_rows, shard_bytes
        # Where it is written to: a script may go to another folder meanwhile. Messages name the path that was given.
        self.folder = path.absolute()
        self._lock: int | None = None
        self._pending: dict[str, tuple[RowInfo, torch.Tensor | None]] = {}
        self._pending_sketches = 0

    @classmethod
    def create(
        cls,
        path: str | Path,
        manifest: Mapping[str, Any],
        *,
        shard_rows: int = 64,
        shard_bytes: int = SHARD_BYTES,
    ) -> SketchStore:
        """Make a store, or continue the one at ``path``, and lock it for this process.

        Args:
            path: the folder.
            manifest: plain JSON values: ``spec``, ``hash_version``, ``stage``, ``model``, ``parameters``,
                ``dtype``, and whatever else the rows depend on. Values under ``notes`` are kept but never
                compared. ``prompts`` is how many rows the store is to hold: with fewer, it is unfinished
                (see :meth:`check_finished`); a store that is continued keeps the larger number.
            shard_rows: rows with a sketch that :meth:`add` collects before it writes them, as a small shard.
            shard_bytes: small shards are joined to shards of this size.

        Raises:
            CropiError: the folder cannot be written, another process writes to it, it was made with other settings
                (the first differing field is named with both values), or it is damaged.
        """
        path, wanted = path_of(path, "path", "the folder of a store"), new_manifest(manifest)
        check_dtype(wanted.get("dtype", "float32"), int(wanted["spec"]["dim"]))
        _check_folder(path)
        store = cls(path, wanted, shard_rows=shard_rows, shard_bytes=shard_bytes)
        try:
            make_folder(path)
            store._lock = lock_folder(path, partial(_in_use, path))
        except OSError as error:
            raise CropiError(
                f"cannot write the store {path}: {reason(error, 'give another --out')}"
            ) from error
        try:
            if is_there(path / MANIFEST):
                store._go_on(wanted)
            else:
                store._write_manifest(wanted)
            store._shards, store._rows = load(path, job_fingerprint(store.manifest), clean=True)
            store._check_shards()
        except BaseException:
            store._release()
            raise
        return store

    def _go_on(self, wanted: Mapping[str, Any]) -> None:
        """Take the manifest in the folder, if it is that of the job ``wanted``; see :meth:`create`."""
        made = read_manifest(self.path)
        check_same_job(self.path, made, wanted)
        self.manifest = made
        if wanted.get("prompts", 0) > made.get("prompts", 0):
            self._write_manifest(made | {"prompts": wanted["prompts"]})

    @classmethod
    def resume(cls, path: str | Path, *, shard_bytes: int = SHARD_BYTES) -> SketchStore:
        """Open the store at ``path`` for writing, under the settings that it was made with.

        Raises:
            CropiError: there is no store at ``path``, or what :meth:`create` raises.
        """
        path = path_of(path, "path", "the folder of a store")
        return cls.create(path, read_manifest(path), shard_bytes=shard_bytes)

    @classmethod
    def open(cls, path: str | Path) -> SketchStore:
        """Open a store for reading.

        Raises:
            CropiError: there is no store at ``path``, its format is newer, or a shard's header is damaged.
        """
        path = path_of(path, "path", "the folder of a store")
        store = cls(path, read_manifest(path))
        store._shards, store._rows = load_steady(store.path, job_fingerprint(store.manifest))
        # Again, after the rows: a job that goes on meanwhile raises the number of prompts before it adds rows, so that
        # a part cannot be taken for the whole.
        store.manifest = read_manifest(store.path)
        store._check_shards()
        return store

    @classmethod
    def join(cls, stores: Sequence[SketchStore]) -> SketchStore:
        """Several stores of one model and stage, read as one; its manifest and path are those of the first.

        Stores that were made with another estimator, tokenizer, template, end token or temperature give a warning
        (:class:`cropi.store.differences.UnlikeStores`).

        Raises:
            CropiError: no store is given, they cannot be compared, or two hold the same prompt.
        """
        if not isinstance(stores, Sequence) or not all(isinstance(store, SketchStore) for store in stores):
            raise CropiError(f"stores is {stores!r:.100}: give a list of SketchStores (SketchStore.open)")
        if not stores:
            raise CropiError("there is no store to read: give at least one")
        joined = cls(stores[0].path, dict(stores[0].manifest))
        counts = [store.manifest.get("prompts") for store in stores]
        joined.manifest.pop("prompts", None)
        if None not in counts:
            joined.manifest["prompts"] = sum(counts)
        share = joined_share([store.manifest for store in stores])
        joined.manifest.pop("share", None)
        if share is not None:
            joined.manifest["share"] = share
        for store in stores:
            names = str(stores[0].path), str(store.path)
            check_comparable(stores[0].manifest, store.manifest, names)
            warn_unlike(stores[0].manifest, store.manifest, names)
            if store.manifest.get(SCALED) != joined.manifest.get(SCALED):
                raise CropiError(
                    f"{stores[0].path} and {store.path} were made with different --optimizer-state and cannot be "
                    "read as one; sketch both with the same"
                )
            twice = sorted(joined._rows.keys() & store._rows.keys())
            if twice:
                raise CropiError(
                    f"{store.path} holds the prompt {twice[0]!r}, and so does another store that is read with it; "
                    "give every prompt once"
                )
            joined._shards.update(store._shards)
            joined._rows.update(store._rows)
        joined.paths = [path for store in stores for path in store.paths]
        joined.joined = [one for store in stores for one in store.joined or [store.manifest]]
        return joined

    def without(self, ids: Container[str]) -> SketchStore:
        """The store as if it held no row of some ids, whose sketches are still streamed; this one stays as it is."""
        made = copy.copy(self)
        made._rows = {name: row for name, row in self._rows.items() if name not in ids}
        if "prompts" in self.manifest:
            gone = len(self) - len(made)
            made.manifest = self.manifest | {"prompts": self.manifest["prompts"] - gone}
        return made

    def add(self, row: RowInfo, sketch: torch.Tensor | None = None) -> list[str]:
        """Add a row; ``sketch`` is float ``[dim]``, or None for a prompt without one.

        Returns:
            The ids made safe by this call (empty unless a shard became full).

        Raises:
            CropiError: the id is already there, the row's text or ``extra`` cannot be written, or the disk is full.
        """
        if row.id in self._rows or row.id in self._pending:
            raise CropiError(f"the store {self.path} already has the prompt {row.id!r}")
        check_characters(row)
        kept = None
        if sketch is not None:
            if tuple(sketch.shape) != (self.dim,):
                raise CropiError(f"sketch: shape [{self.dim}] is expected, got {list(sketch.shape)}")
            kept = sketch.detach().to("cpu", torch.float32, copy=True)
            self._pending_sketches += 1
        self._pending[row.id] = row, kept
        full = self._pending_sketches >= self.shard_rows or len(self._pending) >= 64 * self.shard_rows
        return self.flush() if full else []

    def flush(self) -> list[str]:
        """Write the pending rows as one small shard. When it returns, they survive a kill and a power cut.

        Raises:
            CropiError: the disk is full; earlier shards are intact and the rows stay pending.
        """
        if not self._pending:
            return []
        sketches = [sketch for _, sketch in self._pending.values() if sketch is not None]
        rows = [row for row, _ in self._pending.values()]
        has = [sketch is not None for _, sketch in self._pending.values()]
        table = (
            torch.stack(sketches) if sketches else torch.empty(0, self.dim, dtype=torch.float32, device="cpu")
        )
        self._append(rows, has, encode(table, self.dtype))
        self._pending, self._pending_sketches = {}, 0
        self._tidy(due(self.files(), self.shard_bytes))
        return [row.id for row in rows]

    def append(self, rows: Sequence[RowInfo], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write rows whose sketches are stored numbers already, as one shard.

        Args:
            rows: those with a sketch have a place (``row``), in the order of the tensors' rows.
            tensors: as :func:`cropi.store.codec.encode` gives them, in this store's dtype.

        Raises:
            CropiError: an id is already there, or the disk is full.
        """
        self.flush()
        for row in rows:
            if row.id in self._rows:
                raise CropiError(f"the store {self.path} already has the prompt {row.id!r}")
        self._append(rows, [row.row is not None for row in rows], tensors)

    def _append(
        self,
        rows: Sequence[RowInfo],
        has: Sequence[bool],
        tensors: Mapping[str, torch.Tensor],
        replaces: Sequence[Shard] = (),
    ) -> None:
        self._check_writable()
        number = max(map(shard_number, self._shards), default=-1) + 1
        places = iter(range(len(rows)))
        rows = [placed(row, next(places) if one else None) for row, one in zip(rows, has, strict=True)]
        path = self.folder / f"shard-{number:05d}.safetensors"
        shard = self._write_shard(path, rows, tensors, [shard_number(one.path) for one in replaces])
        self._shards[shard.path] = shard
        self._rows.update((row.id, row) for row in rows)
        for old in replaces:
            del self._shards[old.path]
        with writing(self.folder):
            for old in replaces:
                remove(old.path)

    def compact(self) -> tuple[int, int]:
        """Join all shards that are smaller than ``shard_bytes``; gives the numbers of shards before and after.

        A kill at any instant leaves every row where it was or in its new shard, and never in both for a reader.

        Raises:
            CropiError: the disk is full, or a shard is damaged; the store is as it was.
        """
        self.flush()
        before = len(self._shards)
        for group in groups(self.files(), self.shard_bytes):
            self._join(group)
        return before, len(self._shards)

    def _tidy(self, shards: Sequence[Shard]) -> None:
        """Join shards. Where the disk has no room for that, the shards stay as they are, and no row is lost."""
        if len(shards) > 1:
            with contextlib.suppress(CropiError):
                self._join(shards)

    def _join(self, shards: Sequence[Shard]) -> None:
        rows = [row for shard in shards for row in shard.rows]
        self._append(rows, [row.row is not None for row in rows], join_blocks(shards), shards)

    def finish(self) -> None:
        """Note that the job has gone through all its prompts, so that what the store holds is all of them.

        Raises:
            CropiError: the disk is full.
        """
        self.flush()
        self._tidy(tail(self.files(), self.shard_bytes))
        if self.manifest.get("prompts") != len(self):
            self._write_manifest(self.manifest | {"prompts": len(self)})

    def close(self) -> None:
        """Flush, and let other processes write."""
        try:
            if self._lock is not None:
                self.flush()
        finally:
            self._release()

    def __enter__(self) -> SketchStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except (CropiError, OSError):
            pass  # the error that is already on its way says more

    def _write_shard(
        self, path: Path, rows: list[RowInfo], tensors: Mapping[str, torch.Tensor], replaces: Sequence[int]
    ) -> Shard:
        return write_shard(path, rows, tensors, job_fingerprint(self.manifest), replaces)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self._check_writable()
        write_atomic(self.folder / MANIFEST, manifest_text(manifest))
        self.manifest = manifest

    def _check_writable(self) -> None:
        if self._lock is None:
            raise CropiError(
                f"the store {self.path} is open for reading only; SketchStore.resume opens it for writing"
            )
        if not is_at(self._lock, self.folder / LOCK):
            raise CropiError(
                f"the folder {self.path} was removed or replaced while this job writes to it; what it held is gone "
                "from there; run the same command again"
            )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # closing drops the lock, as the end of the process does
            self._lock = None


def _check_folder(path: Path) -> None:
    """Refuse a folder for a store that holds other things."""
    if is_there(path) and not is_folder(path):
        raise CropiError(f"{path} is a file; give a folder for the store")
    with writing(path):
        held = os.listdir(path) if is_folder(path) else []
    if MANIFEST in held or not held:
        return
    if LOCK not in held:
        raise CropiError(f"{path} is not empty and holds no {MANIFEST}; give a new folder for the store")
    if any(name.startswith("shard-") for name in held):
        raise CropiError(
            f"{path} holds shards but no {MANIFEST}, so what they are sketches of is not known; put it back, or "
            "give a new folder for the store"
        )


def _in_use(path: Path, owner: str) -> InUse:
    return InUse(f"another process (pid {owner}) is writing to the store {path}; wait for it, or end it")
