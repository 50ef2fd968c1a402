"""The same store without a folder: for sketches that no file is to keep."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.store.manifest import FORMAT
from cropi.store.shards import DTYPES, RowInfo, decode, encode
from cropi.store.store import SketchStore

_numbers = itertools.count(1)


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

    def __init__(self, manifest: Mapping[str, Any], *, shard_rows: int = 1024) -> None:
        values = json.loads(json.dumps({"format": FORMAT, "dtype": "float32", **manifest}))
        if values["dtype"] not in DTYPES:
            raise CropiError(f"dtype must be one of {', '.join(DTYPES)}, got {values['dtype']!r}")
        super().__init__(Path(f"memory-{next(_numbers)}"), values, shard_rows=shard_rows)

    def _write_shard(self, path: Path, rows: list[RowInfo], table: torch.Tensor) -> None:
        self._tables[path] = decode(encode(table, self.manifest["dtype"]))

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest

    def _check_writable(self) -> None:
        pass

    def close(self) -> None:
        """Nothing has to be released; rows that are pending are kept."""
        self.flush()
