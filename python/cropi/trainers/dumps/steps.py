"""A folder in which every step of a run wrote its records, ``{step}.jsonl``: of a prompt the newest responses count."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cropi.data.readers import read
from cropi.errors import RecordError, printable
from cropi.trainers.dumps.rollout import write_groups

STEP_FILE = re.compile(r"\d+\.jsonl")


def newest_of_steps(
    files: Sequence[str | Path], skip_bad: bool, say: Callable[[str], None] | None
) -> tuple[Path, tempfile.TemporaryDirectory[str]] | None:
    """The records of all steps in one file, a prompt once, and the folder that it lives in; None: the files are no
    steps, or no prompt is in two of them.

    Args:
        files: records, in the order of their steps.
        skip_bad: as for :func:`cropi.data.readers.read`.
        say: takes a line that says what was left out.

    Raises:
        RecordError: a record is bad, or a step names a prompt twice.
    """
    if len(files) < 2 or not all(STEP_FILE.fullmatch(Path(file).name) for file in files):
        return None
    bad: list[RecordError] = []
    last: dict[str, int] = {}
    count = 0
    for number, file in enumerate(files):
        for group in read(file, skip_bad=skip_bad).each(bad.append):
            last[group.id] = number
            count += 1
    if count == len(last):
        return None
    folder = tempfile.TemporaryDirectory(prefix="cropi-steps-")
    path = Path(folder.name) / "records.jsonl"
    write_groups(
        path,
        (
            group
            for number, file in enumerate(files)
            for group in read(file, skip_bad=skip_bad)
            if last[group.id] == number
        ),
    )
    if say is not None:
        say(
            f"read as       records of {len(files)} steps: {printable(str(Path(files[0]).parent))} ({len(last)} "
            f"prompts, of each the responses of its newest step; {count - len(last)} earlier ones are left out)"
        )
        if bad:
            say(f"  left out    {len(bad)} bad records, the first {printable(str(bad[0]))}")
    return path, folder
