"""Rollouts as they are generated: one append-only file of trajectory records per kind and rank.

A prompt that is visited again gets another line, so ids repeat inside a log; :mod:`cropi.trainers.newest` makes one
line a prompt of it, which is what ``cropi sketch`` reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from cropi.atomic import make_folder, sync
from cropi.errors import CropiError, shown
from cropi.files import entries, is_there, size_of, writing
from cropi.trainers.trl.records import checked_line


class RolloutLog:
    """The log files of one rank in a folder: ``train-rank00000.jsonl``, ``valid-rank00000.jsonl``.

    A line is written by a single call on a file opened for appending; a line that a kill left unfinished is cut off
    when the file is opened again.
    """

    def __init__(self, folder: str | Path, rank: int) -> None:
        self.folder, self.rank = Path(folder), rank
        self._open: dict[str, IO[bytes]] = {}

    def path(self, kind: str) -> Path:
        """The file of this rank for "train" or "valid"."""
        return self.folder / f"{kind}-rank{self.rank:05d}.jsonl"

    def append(self, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records. They are the operating system's when this returns, and on the disk after :meth:`sync`.

        Raises:
            CropiError: a record that ``cropi sketch`` could not read, and nothing is written then; or the disk is full.
        """
        lines = [checked_line(record, str(self.path(kind))) for record in records]
        if not lines:
            return
        left = memoryview("".join(lines).encode())
        with writing(self.path(kind)):
            if kind not in self._open:
                make_folder(self.folder)
                cut_unfinished_line(self.path(kind))
                self._open[kind] = open(self.path(kind), "ab", buffering=0)
                sync(self.folder)
            try:
                while left:  # a disk that is nearly full takes a part, and says so only the next time
                    left = left[self._open[kind].write(left) :]
            except OSError:
                self._open.pop(kind).close()  # the next append cuts the unfinished line off
                raise

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; the size of each of this rank's files, by name."""
        for kind, file in self._open.items():
            with writing(self.path(kind)):
                os.fsync(file.fileno())
        return {path.name: size_of(path) for path in map(self.path, ("train", "valid")) if is_there(path)}

    def close(self) -> None:
        """Close the files; another append opens them again."""
        for file in self._open.values():
            file.close()
        self._open = {}


def log_files(folder: str | Path, kind: str) -> list[Path]:
    """The logs of all ranks."""
    return entries(folder, f"{kind}-rank*.jsonl")


def rewind(folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Cut every log back to the size that a checkpoint knows: what it does not know of did not happen.

    Raises:
        CropiError: a log is shorter than the checkpoint says, so rollouts that it counts on are gone; or it names one
            of another folder.
    """
    for name, size in sizes.items():
        if Path(name).name != name or name in ("", ".."):
            raise CropiError(
                f"{folder}: the checkpoint names the log {shown(name)}, which is no name of a file in there; go on "
                "from another checkpoint"
            )
        path = Path(folder) / name
        there = size_of(path)
        if there < size:
            raise CropiError(
                f"{path} has {there} bytes, but the checkpoint knows of {size}: rollouts that selection builds on are "
                "gone; restore the file, or start again in a new output folder"
            )
    for path in (*log_files(folder, "train"), *log_files(folder, "valid")):
        size = sizes.get(path.name, 0)
        with writing(path):
            if size == 0:
                path.unlink()
            else:
                os.truncate(path, size)


def cut_unfinished_line(path: Path) -> None:
    """Remove what stands behind the last newline of a file, if it is there.

    Raises:
        CropiError: the file cannot be read or written.
    """
    if not size_of(path):
        return
    with writing(path), open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            if cut >= 0:
                file.truncate(start + cut + 1)
                return
            end = start
        file.truncate(0)
