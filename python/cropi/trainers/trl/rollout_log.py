"""Rollouts as they are generated: one append-only file of trajectory records per kind and rank.

A prompt that is visited again gets another line, so ids repeat inside a log; :func:`merge_rollouts` writes one line a
prompt, which is what ``cropi sketch`` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from cropi.atomic import make_folder, replacing, sync
from cropi.data.fast import RecordReader
from cropi.errors import CropiError, RecordError, shown
from cropi.files import entries, is_there, reading, size_of, writing
from cropi.sealed import summed
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


class Newest:
    """Where the newest rollouts of every prompt stand in logs that grow: what was read once is not read again.

    Args:
        on_bad: takes the error of every line that is no record, which is left out unless it raises; None: a line
            without an id is an error, and the rest of it is not looked at.
    """

    def __init__(self, on_bad: Callable[[RecordError], None] | None = None) -> None:
        self._on_bad, self._reader = on_bad, RecordReader()
        self._places: dict[str, tuple[int, Path, int, int]] = {}  # by prompt: step, file, offset, checksum
        self._read: dict[Path, int] = {}  # the bytes of each file that have been read
        self.count = 0  # of the lines that have been read

    def read(self, path: Path) -> None:
        """Read on in a log, to its last whole line: another rank may be in the middle of one.

        Raises:
            CropiError: a line is not a record, or the log is shorter than before.
        """
        before = self._read.get(path, 0)
        if size_of(path) < before:
            raise CropiError(
                f"{path} has become shorter: rollouts that selection builds on are gone; go on from a checkpoint"
            )
        with reading(path), open(path, "rb") as file:
            offset = file.seek(before)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if (key := self._key(line, path, offset)) is not None:
                    name, step = key
                    # Equal steps: a later line of the same file is newer; between files the order is that of the ranks.
                    place = step, path, offset, crc32(line)
                    self._places[name] = max(self._places.get(name, place), place)
                    self.count += 1
                offset += len(line)
            self._read[path] = offset

    def _key(self, line: bytes, path: Path, offset: int) -> tuple[str, int] | None:
        """The id and the step of a line; None: it is left out."""
        if self._on_bad is None:
            return _key(line, path)
        if not line.strip():
            return None  # as the reader of records has it
        where = f"{path} (byte {offset})"
        try:
            group = self._reader(line, where)
            given = group.extra.get("step", 0)
            try:
                return group.id, int(given)
            except (ValueError, TypeError, OverflowError):
                raise RecordError(where, f"'step' is {shown(given)}, and should be an integer") from None
        except RecordError as error:
            self._on_bad(error)
            return None

    def lines(self) -> Iterator[bytes]:
        """The newest line of every prompt, in order of id.

        Raises:
            CropiError: a line is not the one that was read there.
        """
        with ExitStack() as stack:
            files = {}
            for path in self._read:
                with reading(path, missing=True):
                    files[path] = stack.enter_context(open(path, "rb"))
            for name in sorted(self._places):
                _, path, offset, checksum = self._places[name]
                with reading(path):
                    files[path].seek(offset)
                    line = files[path].readline()
                if crc32(line) != checksum:
                    raise CropiError(
                        f"{path} has changed where it had been read: the rollouts of {shown(name)} are gone; go on "
                        "from a checkpoint"
                    )
                yield line

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        """The bytes that have been read of all logs."""
        return sum(self._read.values())


def merge_rollouts(logs: Sequence[str | Path], out: str | Path, newest: Newest | None = None) -> int:
    """Write one record a prompt, in order of id, from logs in which a prompt may occur several times.

    Each prompt's newest rollouts are taken, which the current policy is nearest to.

    Args:
        logs: files whose records carry ``step``, the optimizer step at which they were sampled.
        out: the file to write, whole or not at all.
        newest: what earlier calls have read of the same logs; the calls of a run then read every line once.

    Returns:
        The number of prompts.

    Raises:
        CropiError: no record at all, or a line that is not one.
    """
    newest = Newest() if newest is None else newest
    for path in logs:
        newest.read(Path(path))
    if not newest:
        raise CropiError(f"{', '.join(map(str, logs)) or 'no log'}: no rollout has been recorded yet")
    with summed(out), replacing(Path(out)) as temporary, open(temporary, "wb") as target:
        target.writelines(newest.lines())
    return len(newest)


def _key(line: bytes, path: Path) -> tuple[str, int]:
    try:
        record = json.loads(line)
        return str(record["id"]), int(record.get("step", 0))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CropiError(
            f"{path}: a line is not a recorded rollout ({error}); restore the file, or remove the line"
        ) from error
