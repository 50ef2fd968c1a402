"""What a store holds: its rows and sketches, read in blocks, and whether they are all that it is to hold."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi.errors import CropiError
from cropi.store.codec import decode
from cropi.store.manifest import groups_in
from cropi.store.rows import OK, RowInfo
from cropi.store.shards import Block, Shard
from cropi.store.shares import lacking_shares, share_text


class StoredSketches:
    """The reading side of :class:`cropi.store.store.SketchStore`.

    Attributes:
        path: the folder; of stores that are read as one, the first one's.
        manifest: what the rows are sketches of.
        paths: the folders of the stores that are read as one.
        joined: the manifests of stores that are read as one; empty for one alone.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.paths = [path]
        self.joined: list[dict[str, Any]] = []
        self._shards: dict[Path, Shard] = {}
        self._rows: dict[str, RowInfo] = {}

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def files(self) -> list[Shard]:
        """The shards, in the order in which they are read."""
        return list(self._shards.values())

    def rows(self) -> list[RowInfo]:
        """Every finished row, in order of prompt id: independent of the order in which they were computed."""
        return sorted(self._rows.values(), key=attrgetter("id"))

    def unread(self) -> Iterator[Block]:
        """The rows with a sketch by blocks, in the order of the files, for threads that read a block each.

        Raises:
            CropiError: a shard's checksum does not match; the shard is named. Reading a block raises it too.
        """
        for shard in self.files():
            yield from shard.unread()

    def blocks(self) -> Iterator[tuple[list[RowInfo], dict[str, torch.Tensor]]]:
        """Stream the sketches as they are stored: rows, and their numbers (:func:`cropi.store.codec.decode`).

        Every block's checksum is checked. Memory is used again: a block is valid until the next is asked for.

        Raises:
            CropiError: a shard's checksum does not match; the shard is named.
        """
        for shard in self.files():
            yield from shard.blocks()

    def shards(self) -> Iterator[tuple[list[RowInfo], torch.Tensor]]:
        """Stream the store by blocks of at most 16 MiB (or one row): rows, and their sketches as float32 ``[n, dim]``.

        Raises:
            CropiError: a shard's checksum does not match; the shard is named.
        """
        for rows, tensors in self.blocks():
            table = decode(tensors)
            yield (
                rows,
                table.clone() if table.data_ptr() == next(iter(tensors.values())).data_ptr() else table,
            )

    def to_numpy(self) -> tuple[list[str], NDArray[np.float32]]:
        """The ids of the prompts that have a sketch, in order, and their sketches, float32 ``[n, dim]``, in memory.

        Raises:
            CropiError: a shard's checksum does not match; the shard is named.

        >>> from cropi.store.memory import MemoryStore
        >>> store = MemoryStore({"spec": {"dim": 64}})
        >>> for name in ("b", "a"):
        ...     _ = store.add(RowInfo(name), torch.ones(64))
        >>> store.finish()
        >>> ids, sketches = store.to_numpy()
        >>> ids, sketches.shape
        (['a', 'b'], (2, 64))
        """
        ids = [row.id for row in self.rows() if row.row is not None]
        places = {name: place for place, name in enumerate(ids)}
        table = np.empty((len(ids), self.dim), np.float32)
        for rows, sketches in self.shards():
            table[[places[row.id] for row in rows]] = sketches.numpy()
        return ids, table

    def verify(self) -> int:
        """Check every shard's checksums, those of ``sha256sum`` too; returns how many shards there are."""
        for shard in self._shards.values():
            shard.verify()
        return len(self._shards)

    def check_finished(self, *, alone: bool = True) -> None:
        """Refuse to rank a part of the prompts as if it were all.

        A store that does not say how many prompts it is to hold passes: an earlier release made it, or other hands.

        Args:
            alone: it is read without others, so that a share of a job (``--shard``) will not do.

        Raises:
            CropiError: the job that fills the store has not gone through all its prompts.
        """
        if len(self) < self.expected:
            raise CropiError(
                f"the store {self.path} holds {len(self)} of {self.expected} prompts: its sketching run was "
                "interrupted, or still goes on; run the same command again to sketch the rest, or with a --limit that "
                "is reached to take fewer on purpose"
            )
        lacking = lacking_shares(self.manifest) if alone else []
        if lacking:
            held = (
                f"the store {self.path} was made with --shard {share_text(self.manifest)} and holds a share"
            )
            if len(self.paths) > 1:
                held = f"the stores {', '.join(map(str, self.paths))} hold only a share"
            raise CropiError(
                f"{held} of the {self.manifest['share']['prompts']} prompts of a job: the share"
                f"{'s' * (len(lacking) > 1)} {', '.join(lacking[:20])} must be read with it, made with the same "
                "options (`cropi store merge`, or all of them to --train or --valid)"
            )

    @property
    def expected(self) -> int:
        """Prompts that the store is to hold; where the manifest does not say, those that it holds."""
        return int(self.manifest.get("prompts", len(self)))

    @property
    def dtype(self) -> str:
        """How its numbers are stored."""
        return str(self.manifest.get("dtype", "float32"))

    @property
    def dim(self) -> int:
        """Numbers per row: of one sketch, or of those of all groups of parameters."""
        return int(self.manifest["spec"]["dim"]) * max(len(self.groups), 1)

    @property
    def groups(self) -> list[str]:
        """The groups of parameters whose sketches make up a row; none where a row is one sketch."""
        return list(groups_in(self.manifest) or ())

    def __repr__(self) -> str:
        spec, ready = self.manifest.get("spec", {}), sum(row.status == OK for row in self._rows.values())
        held = f"{len(self)} prompts, {ready} with a sketch of {spec.get('dim')}"
        return f"{type(self).__name__}({str(self.path)!r}: {held}, stage {self.manifest.get('stage')!r})"

    def _check_shards(self) -> None:
        for shard in self._shards.values():
            shard.check_width(self.dim)
        if len(self) > self.expected:
            raise CropiError(
                f"the store {self.path} holds {len(self)} prompts, but its manifest says {self.expected}: a shard of "
                "another store was copied into it; take it out of the folder, or make the store again"
            )
