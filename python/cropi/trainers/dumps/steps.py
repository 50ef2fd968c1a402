"""A folder in which every step of a run wrote its records, ``{step}.jsonl``, or every rank its log of all steps,
``train-rank00000.jsonl``: of a prompt the newest responses count."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cropi.data.readers import read
from cropi.errors import RecordError, printable
from cropi.files import size_of
from cropi.temporary import KeptFolder
from cropi.trainers.dumps.rollout import write_groups
from cropi.trainers.newest import Newest, merge_rollouts

STEP_FILE = re.compile(r"\d+\.jsonl")
# As :class:`cropi.trainers.trl.rollout_log.RolloutLog` names its files.
RANK_LOG = re.compile(r"(train|valid)-rank\d+\.jsonl")


def logs_together(paths: Sequence[Any]) -> list[Any]:
    """Paths as they were given, but with a list of those that are logs of one run's ranks, in the place of the first.

    Their records say which of a prompt's responses are newest, so that the order of the names does not matter.

    >>> logs_together(["b.jsonl", "o/train-rank00000.jsonl", "o/train-rank00001.jsonl"])
    ['b.jsonl', ['o/train-rank00000.jsonl', 'o/train-rank00001.jsonl']]
    """
    made: list[Any] = []
    runs: dict[tuple[Path, str], list[Any]] = {}
    for path in paths:
        found = RANK_LOG.fullmatch(Path(path).name)
        if found is None:
            made.append(path)
            continue
        run = Path(path).parent, found[1]
        if run not in runs:
            made.append(runs.setdefault(run, []))
        runs[run].append(path)
    return [one[0] if isinstance(one, list) and len(one) == 1 else one for one in made]


def newest_of_steps(
    files: Sequence[str | Path], skip_bad: bool, say: Callable[[str], None] | None
) -> tuple[Path, KeptFolder] | None:
    """The records of all steps in one file, a prompt once, and the folder that it lives in; None: the files are no
    steps and no logs of ranks, or no prompt is in them twice.

    Args:
        files: the records of a folder, in the order of their steps.
        skip_bad: as for :func:`cropi.data.readers.read`.
        say: takes a line that says what was left out.

    Raises:
        RecordError: a record is bad, or a step names a prompt twice.
    """
    paths = [Path(file) for file in files]
    # Of several folders, or with one number twice (01, 1), no order says which responses are newer.
    if len({path.parent for path in paths}) > 1:
        return None
    names = [path.name for path in paths]
    if all(RANK_LOG.fullmatch(name) for name in names) and len({name.split("-")[0] for name in names}) == 1:
        return _newest_of_logs(files, skip_bad, say)
    if len(files) < 2 or not all(STEP_FILE.fullmatch(name) for name in names):
        return None
    if len({int(path.stem) for path in paths}) < len(paths):
        return None
    bad: list[RecordError] = []
    last: dict[str, int] = {}
    count = 0
    for number, file in enumerate(files):
        for group in read(file, skip_bad=skip_bad, rewards=None).each(bad.append):
            if group.demonstrations:  # parts of a data set, and no steps of a run
                return None
            last[group.id] = number
            count += 1
    if count == len(last):
        return None
    path, folder = _made()
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
        say(_line(f"{len(files)} steps", files, len(last), count))
        _say_bad(bad, say)
    return path, folder


def _newest_of_logs(
    files: Sequence[str | Path], skip_bad: bool, say: Callable[[str], None] | None
) -> tuple[Path, KeptFolder] | None:
    bad: list[RecordError] = []

    def on_bad(error: RecordError) -> None:
        if not skip_bad:
            raise error
        bad.append(error)

    newest = Newest(on_bad)
    logs = list(dict.fromkeys(map(Path, files)))
    for log in logs:
        newest.read(log)
    unfinished = sum(map(size_of, logs)) > newest.size
    # Where no prompt is there at all, the reader of the files themselves says so.
    if not newest or (newest.count == len(newest) and not unfinished):
        return None
    path, folder = _made()
    merge_rollouts(files, path, newest)
    if say is not None:
        say(_line("the rollouts of a run", files, len(newest), newest.count))
        _say_bad(bad, say)
        if unfinished:
            say("  left out    the last line of a log, which was not written to its end")
    return path, folder


def _say_bad(bad: Sequence[RecordError], say: Callable[[str], None]) -> None:
    if bad:
        say(f"  left out    {len(bad)} bad records, the first {printable(bad[0].of_left_out)}")


def _made() -> tuple[Path, KeptFolder]:
    folder = KeptFolder("cropi-steps-")
    return folder.path / "records.jsonl", folder


def _line(what: str, files: Sequence[str | Path], prompts: int, records: int) -> str:
    return (
        f"read as       records of {what}: {printable(str(Path(files[0]).parent))} ({prompts} prompts, of each the "
        f"responses of its newest step; {records - prompts} earlier ones are left out)"
    )
