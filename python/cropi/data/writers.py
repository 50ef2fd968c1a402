"""Newer records in the place of older ones of the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.atomic import replacing
from cropi.data.readers import read
from cropi.sealed import summed


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
