"""The same store without a folder: for sketches that no file is to keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cropi.store.codec import check_dtype, decode
from cropi.store.manifest import new_manifest
from cropi.store.rows import RowInfo
from cropi.store.shards import Block, Shard
from cropi.store.store import SketchStore

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class MemoryShard(Shard):
    """A shard in memory: float32 rows, which went through the store's dtype."""

    table: torch.Tensor

    def unread(self) -> Iterator[Block]:
        """One block."""
        if self.kept:
            yield Block(self.kept, 0, lambda _: {"sketch": self.table})

    def verify(self) -> None:
        """Nothing can be damaged."""


class MemoryStore(SketchStore):
    """A :class:`SketchStore` in memory: written and read in the same way, gone with the process.

    Sketches go through the manifest's ``dtype`` as on disk, so that they are the same numbers.

    >>> store = MemoryStore({"spec": {"dim": 64}})
    >>> store.add(RowInfo("a"), torch.ones(64)), store.add(RowInfo("b", "skipped", "equal rewards"))
    ([], [])
    >>> store.finish()
    >>> [(rows[0].id, sketches.shape) for rows, sketches in store.shards()], len(store)
    ([('a', torch.Size([1, 64]))], 2)
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        values = new_manifest({"dtype": "float32", **manifest})
        check_dtype(values["dtype"], int(values["spec"]["dim"]))
        super().__init__(Path(f"memory-{next(_numbers)}"), values, shard_rows=1024)

    def _write_shard(
        self, path: Path, rows: list[RowInfo], tensors: Mapping[str, torch.Tensor], replaces: Sequence[int]
    ) -> Shard:
        kept = [row for row in rows if row.row is not None]
        return MemoryShard(path, rows, kept, {}, {}, (), decode(tensors))

    def _tidy(self, shards: Sequence[Shard]) -> None:
        pass

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest

    def _check_writable(self) -> None:
        pass

    def close(self) -> None:
        """Nothing has to be released; rows that are pending are kept."""
        self.flush()


class Nowhere(MemoryStore):
    """Takes rows that another process keeps."""

    def add(self, row: RowInfo, vector: torch.Tensor | None = None) -> list[str]:
        """See :meth:`SketchStore.add`; nothing is kept."""
        return []
