"""The newest rollouts of every prompt in logs that grow, in which a prompt stands as often as it was visited."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from zlib import crc32

from cropi.atomic import replacing
from cropi.data.fast import RecordReader
from cropi.errors import CropiError, RecordError, shown
from cropi.files import reading, size_of
from cropi.sealed import summed


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
