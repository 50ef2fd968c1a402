"""Prompt groups to files, and newer records in place of older ones."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.files import replacing
from cropi.sealed import summed


def write_trajectories(path: str | Path, groups: Iterable[PromptGroup]) -> int:
    """Write prompt groups as JSON lines (gzip when the name ends in ``.gz``), whole or not at all; returns how many."""
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


def replace_records(stored: Any, newer: Any, out: str | Path) -> Replaced:
    """Write the records of ``stored`` to ``out``, each replaced by that of ``newer`` where it has the same id.

    ``stored`` and ``newer`` are what :func:`cropi.data.readers.read` takes or gave.

    Raises:
        CropiError, RecordError: a file is missing or holds a bad record.
    """
    fresh, counts = read(newer), Replaced()
    known = {group.id for group in fresh}  # a full pass, which checks the records and keeps their places
    with (
        summed(out),
        replacing(Path(out)) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
    ):
        with fresh.lookup() as find:
            for group in read(stored):
                if group.id in known:
                    counts.replaced += 1
                    group = find(group.id)
                counts.without_logprobs += group.logprobs is None
                file.write(group.raw + "\n")
    counts.unknown = len(known) - counts.replaced
    return counts


@contextmanager
def _open_to_write(path: Path) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        stack.enter_context(summed(path))
        file: Any = stack.enter_context(open(stack.enter_context(replacing(path)), "wb"))
        if path.suffix == ".gz":
            # No time stamp and no name in the header: equal content gives equal bytes.
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline="\n"))
