"""Files of prompt groups: streaming JSON lines in and out, gzip or plain."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from cropi.data.records import PromptGroup, parse_record
from cropi.errors import CropiError, RecordError
from cropi.files import replacing


def read_trajectories(
    paths: str | Path | Sequence[str | Path],
    *,
    skip_bad: bool = False,
    on_bad: Callable[[RecordError], None] | None = None,
    on_line: Callable[[bytes], None] | None = None,
) -> Iterator[PromptGroup]:
    """Stream the prompt groups of one or more ``.jsonl`` or ``.jsonl.gz`` files, one line in memory at a
    time.

    Args:
        paths: the files, read in the order given. A prompt id must be unique over all of them.
        skip_bad: go on after a bad record (it is left out) instead of raising.
        on_bad: called with the error of every record that is left out.
        on_line: called with the bytes of every line as it is read (for a checksum, or a byte count).

    Raises:
        RecordError: a malformed or inconsistent record, with ``file:line`` and the remedy.
        CropiError: a file is missing, unreadable, damaged or holds no record.
    """
    seen: dict[str, str] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        empty = True
        for where, line in _lines(Path(path)):
            if on_line is not None:
                on_line(line)
            if not line.strip():
                continue
            empty = False
            try:
                group = parse_record(line, where)
                if group.id in seen:
                    raise RecordError(
                        where,
                        f"the prompt id {group.id!r} was used before, at {seen[group.id]}",
                        "give every prompt its own id, or pass --skip-bad to keep the first",
                    )
            except RecordError as error:
                if not skip_bad:
                    raise
                if on_bad is not None:
                    on_bad(error)
                continue
            seen[group.id] = where
            yield group
        if empty:
            raise CropiError(
                f"{path}: the file holds no trajectory record (one JSON object a line is expected)"
            )


def write_trajectories(path: str | Path, groups: Iterable[PromptGroup]) -> int:
    """Write prompt groups as JSON lines (gzip when the name ends in ``.gz``); returns how many."""
    count = 0
    with _open_to_write(Path(path)) as file:
        for group in groups:
            file.write(json.dumps(group.to_record(), ensure_ascii=False) + "\n")
            count += 1
    return count


@dataclass
class Replaced:
    """What :func:`replace_records` did: records that it replaced, newer ones that belong to no stored one (and are left
    out), and records without log-probs among those that it wrote."""

    replaced: int = 0
    unknown: int = 0
    without_logprobs: int = 0


def replace_records(
    stored: Sequence[str | Path], newer: str | Path, out: str | Path, *, skip_bad: bool = False
) -> Replaced:
    """Write the records of ``stored`` to ``out``, each replaced by that of ``newer`` where it has the same id.

    Raises:
        CropiError, RecordError: a file is missing or holds a bad record.
    """
    fresh = {group.id: group for group in read_trajectories(newer, skip_bad=skip_bad)}
    counts = Replaced()
    with replacing(Path(out)) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for group in read_trajectories(stored, skip_bad=skip_bad):
            counts.replaced += group.id in fresh
            group = fresh.get(group.id, group)
            counts.without_logprobs += group.logprobs is None
            file.write(group.raw + "\n")
    counts.unknown = len(fresh) - counts.replaced
    return counts


def _open_to_read(path: Path) -> IO[bytes]:
    # By content, not by name: files are renamed, and a download may have unpacked one.
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else open(path, "rb")


@contextmanager
def _open_to_write(path: Path) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "wb"))
        if path.suffix == ".gz":
            # No time stamp and no name in the header: equal content gives equal bytes.
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline="\n"))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        raise CropiError(f"{path} is a folder; give trajectory files (.jsonl or .jsonl.gz)")
    if not path.exists():
        raise CropiError(f"{path}: there is no such trajectory file")
    if not path.is_file():
        raise CropiError(
            f"{path} is a pipe or a device, but trajectories are read twice; write them to a file"
        )
    number = 0
    try:
        with _open_to_read(path) as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CropiError(
            f"{path}: the gzip stream is damaged after line {number} ({error}); copy it again"
        ) from error
