"""Files of trainers and engines where trajectory records are expected: recognised, converted, and read as records."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cropi import options
from cropi.amounts import counted
from cropi.data.forms import parse_columns
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.sources import PathSource
from cropi.errors import CropiError, printable, shown, warn
from cropi.files import size_of
from cropi.sealed import sum_of
from cropi.temporary import KeptFolder
from cropi.trainers.dumps import text_rows
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.folders import expanded, is_name
from cropi.trainers.dumps.pickled import check_size
from cropi.trainers.dumps.reading import PLAIN, Reading
from cropi.trainers.dumps.recognise import RECORDS, SOURCES, recognise
from cropi.trainers.dumps.rollout import Rollout, Written, group_rollouts, write_groups
from cropi.trainers.dumps.steps import logs_together, newest_of_steps

AUTO = "auto"


def read_rollouts(
    path: str | Path, source: str, reading: Reading = PLAIN, left: Left | None = None
) -> Iterator[Rollout]:
    """The rollouts in one dump; text may be packed.

    Args:
        path: the file.
        source: what wrote it. Its reader says what it takes for a prompt's id, and of ``reading``.
        reading: what the file does not say of itself.
        left: takes the samples that are left out; None raises at the first bad one.

    Raises:
        CropiError: the file does not exist, is too large, or of another layout.
        BadSample: a sample with a field that is missing or of another form.
    """
    path, left = Path(path), Left() if left is None else left
    check_size(path, reading.largest)
    if source in text_rows.COLUMNS:
        return text_rows.read_dump(path, source, reading, left)
    reader = importlib.import_module(f"cropi.trainers.dumps.{SOURCES[source].reader}")
    rollouts: Iterator[Rollout] = reader.read_dump(path, reading, left)
    return rollouts


def rollouts_of(paths: Iterable[str | Path], source: str, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in several dumps, one after the other.

    Raises:
        CropiError: one of them holds none at all; otherwise as :func:`read_rollouts`.
    """
    for path in paths:
        empty, before = True, left.counts.total()
        for rollout in read_rollouts(path, source, reading, left):
            empty = False
            yield rollout
        if empty and left.counts.total() == before:
            raise CropiError(
                f"{path} holds no rollout that can be used: it is empty; leave it out, or write it again"
            )


def check_copies(paths: Iterable[str | Path]) -> None:
    """Check that no two files hold the same, whose rollouts would count twice.

    Raises:
        CropiError: two do; names them.
    """
    alike: dict[int, list[str | Path]] = {}
    for path in paths:
        alike.setdefault(size_of(path), []).append(path)
    # What is empty, or not there, its reader says.
    for some in (some for size, some in alike.items() if size and len(some) > 1):
        first: dict[str, str | Path] = {}
        for path in some:
            held = sum_of(Path(path))
            if held in first:
                raise CropiError(
                    f"{path} holds the same as {first[held]}, so that its rollouts would count twice; give one of them"
                )
            first[held] = path


class DumpSource(PathSource):
    """Prompts of dumps, as a file of records that lives as long as this; ``left``: see :class:`Dumps`."""

    converted = True

    def __init__(self, path: Path, name: str, left: Left, folder: KeptFolder) -> None:
        super().__init__(path, f"{name}, as records")
        self.left, self._folder, self._given = left, folder, name

    @property
    def files(self) -> list[str]:
        return [self._given]


class Dumps:
    """Dumps of one run, whose rollouts of a prompt are put together.

    Args:
        given: the files of every path that was given, by its name.
        source: what wrote them.
        reading: how they are read.
        skip_bad: leave bad samples out, and count them.

    Attributes:
        sources: of every path that was given, the prompts whose newest responses it holds, if there are some.
        files: the dumps.
        written: how many prompts and responses they hold.
        left: the samples that were left out.
    """

    def __init__(
        self, given: Mapping[str, Sequence[str | Path]], source: str, reading: Reading, skip_bad: bool
    ) -> None:
        self.files, self.source = [path for files in given.values() for path in files], source
        self.left, self.written = Left(skip_bad), Written()
        check_copies(self.files)
        newest: dict[str, tuple[int, str]] = {}

        def rollouts() -> Iterator[Rollout]:
            for name, files in given.items():
                for rollout in rollouts_of(files, source, reading, self.left):
                    if rollout.id not in newest or rollout.step > newest[rollout.id][0]:
                        newest[rollout.id] = rollout.step, name
                    yield rollout

        numbers = {name: number for number, name in enumerate(given)}
        groups = group_rollouts(
            rollouts(), steps=reading.steps, left=self.left, order=lambda one: (numbers[newest[one][1]], one)
        )
        folder = KeptFolder("cropi-dump-")
        self.sources: list[DumpSource] = []
        for name, own in groupby(groups, key=lambda group: newest[group.id][1]):
            path = folder.path / f"records-{len(self.sources)}.jsonl"
            self.written += write_groups(path, own)
            self.sources.append(DumpSource(path, name, self.left, folder))

    def lines(self) -> Iterator[str]:
        """One line that says what was read, and one for every reason to leave samples out."""
        counts = {"token ids": self.written.with_ids, "log-probs": self.written.with_logprobs}
        held = [name for name, count in counts.items() if count]
        some = f"{', '.join(held)}" if held else "text"
        out = f"; {counted(self.left.counts.total(), 'sample')} left out" if self.left.counts else ""
        shown = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
        yield (
            f"read as       {SOURCES[self.source].words}: {printable(shown)} "
            f"({counted(self.written.prompts, 'prompt')}, {counted(self.written.responses, 'response')}; {some}{out})"
        )
        for name, error in self.left.first.items():
            count = self.left.counts[name]
            yield printable(f"  left out    {count} by {name}, the first {error.where}: {error.problem}")


def opened(
    given: Any,
    source: str = AUTO,
    *,
    skip_bad: bool = False,
    columns: str | Mapping[str, str] | None = None,
    reading: Reading | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """What :func:`cropi.data.readers.read` takes, with a source of records in place of every dump.

    Args:
        given: a path, a list of paths (a folder stands for the files in it), or anything else, which is left as it is.
        source: what wrote the files: one of :data:`cropi.options.SOURCES`.
        skip_bad: leave bad samples of dumps out, and count them.
        columns: as for :func:`cropi.data.readers.read`.
        reading: how dumps are read.
        say: takes a line that says what a dump was taken for.

    Raises:
        CropiError: an unknown source, or as :func:`cropi.trainers.dumps.recognise.recognise` and the readers.
    """
    if source not in options.SOURCES:
        raise CropiError(f"source must be one of {', '.join(options.SOURCES)}, got {source!r}")
    several = isinstance(given, (list, tuple))
    paths = list(given) if several else [given]
    if source == RECORDS or not paths or not all(isinstance(path, (str, Path)) for path in paths):
        return given
    parts: list[list[Any]] = []
    # The dumps of a kind are read together, and their sources stand where the first of them does.
    runs: dict[str, dict[str, list[str | Path]]] = {}
    places: dict[str, list[Any]] = {}
    for one in logs_together(paths):
        found = expanded(one if isinstance(one, list) else [one], say)
        kinds = [_kind(path, source, columns) for path in found]
        if set(kinds) == {RECORDS} and not columns:
            parts.append(_of_steps(found, one, skip_bad, say))
            continue
        for path, kind in zip(found, kinds, strict=True):
            if kind == RECORDS:
                parts.append([path])
                continue
            if kind not in runs:
                parts.append(places.setdefault(kind, []))
            runs.setdefault(kind, {}).setdefault(_named(one), []).append(path)
    if runs:
        reading = reading or Reading(columns=parse_columns(columns))
        for kind, files in runs.items():
            if unused := unused_columns(kind, reading.columns):
                names = printable(", ".join(files))
                warn(f"columns: {unused} no effect on {names}, read as {SOURCES[kind].words}")
            held = Dumps(files, kind, reading, skip_bad)
            places[kind] += held.sources
            if say is not None:
                for line in held.lines():
                    say(line)
    made = [part for some in parts for part in some]
    return given if made == paths else made


def _of_steps(
    files: Sequence[str | Path], given: Any, skip_bad: bool, say: Callable[[str], None] | None
) -> list[Any]:
    """The files, or one source of what they hold, where they are the steps of a run that share prompts; ``given``: the
    path, or the list of logs, that they stand for."""
    held = newest_of_steps(files, skip_bad, say)
    return list(files) if held is None else [DumpSource(held[0], _named(given), Left(skip_bad), held[1])]


def _named(given: Any) -> str:
    return ", ".join(map(str, given)) if isinstance(given, list) else str(given)


def _kind(path: str | Path, source: str, columns: Any) -> str:
    if is_name(path):
        return RECORDS
    if source != AUTO:
        return source
    return recognise(path, renamed=bool(columns))


def unused_columns(kind: str, columns: Mapping[str, str]) -> str:
    """The names in ``columns`` at which the reader of ``kind`` does not look, and a verb; nothing where it looks at
    all."""
    seen = columns if kind == RECORDS else ("reward",) if SOURCES[kind].columns else ()
    names = [shown(name) for name in columns if name not in seen]
    return f"{', '.join(names)} {'have' if len(names) > 1 else 'has'}" if names else ""


def _check_used(kind: str, reading: Reading) -> None:
    source = SOURCES[kind]
    if source.columns and (unused := unused_columns(kind, reading.columns)):
        raise CropiError(f"--columns: {unused} no effect on {source.words}; leave out all but reward=")
    used = dict.fromkeys(("id_key", "temperature", "steps", "largest"), kind != RECORDS)
    for name, looked_at in (used | {"allow_pickle": source.pickled, "columns": source.columns}).items():
        if not looked_at and getattr(reading, name) != getattr(PLAIN, name):
            option = "max-gib" if name == "largest" else name.replace("_", "-")
            raise CropiError(f"--{option} has no effect on {SOURCES[kind].words}; leave it out")


def groups_of(
    given: Sequence[str | Path], source: str, reading: Reading, left: Left, say: Callable[[str], None]
) -> Iterable[PromptGroup]:
    """All prompt groups of some files, for ``cropi convert``.

    Raises:
        CropiError: the files are of several kinds, or as the readers.
    """
    given = logs_together(given)
    found = [expanded(one if isinstance(one, list) else [one], say) for one in given]
    paths = [path for part in found for path in part]
    kinds = {str(path): _kind(path, source, reading.columns) for path in paths}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{path} ({SOURCES[kind].words})" for path, kind in list(kinds.items())[:6])
        raise CropiError(f"the files are of several kinds: {told}; convert each kind by itself")
    kind = next(iter(kinds.values()))
    if source == AUTO:
        say(f"read as       {SOURCES[kind].words}")
    _check_used(kind, reading)
    if kind == RECORDS:
        made: list[Any] = paths
        if not reading.columns:
            # Files that are named one by one stand in the shell's order, and may be of several runs.
            made = [
                source
                for one, part in zip(given, found, strict=True)
                for source in _of_steps(part, one, left.skip_bad, say)
            ]
        return _some(read(made, skip_bad=left.skip_bad, columns=dict(reading.columns)).each(left.note), left)
    check_copies(paths)
    rollouts = rollouts_of(paths, kind, reading, left)
    if reading.prompts is not None:
        rollouts = left.each(rollouts, reading.prompts.named)
    return _some(group_rollouts(rollouts, steps=reading.steps, left=left), left)


def _some(groups: Iterable[PromptGroup], left: Left) -> Iterator[PromptGroup]:
    """The groups, or an error where all are left out."""
    empty = True
    for group in groups:
        empty = False
        yield group
    if empty and left.counts:
        first = next(iter(left.first.values()))
        raise CropiError(
            f"no usable sample is left ({left.counts.total()} left out); the first: {first.where}: {first.problem}"
        )
