"""Where every record of some files stands, so that later passes read only the records they need.

In files of lines that is the line's offset; in a table, parquet or arrow, it is the number of the row.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from cropi.data.fast import RecordReader
from cropi.data.records import PromptGroup
from cropi.data.sources import Source
from cropi.errors import CropiError, RecordError
from cropi.files import open_to_read

# Of so many lists of files, the places are kept; a run has one for training and one for every validation set. Of more
# prompts than these, the last list's alone: files that are made anew again and again would fill the memory.
_KEPT: OrderedDict[tuple[Any, ...], Places] = OrderedDict()
_MOST, _MOST_PROMPTS = 16, 2**21


class Places:
    """The place of every prompt id: a number, and by it the source and the line's offset. Some 150 bytes a prompt."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._sources, self._offsets, self._lines = array("H"), array("q"), array("q")
        self._names: dict[int, str] = {}
        self._wheres: dict[int, str] = {}
        self.by_offset = True

    def add(
        self, group: PromptGroup, source: int, where: str, offset: int | None, hashed: bool | None
    ) -> None:
        """Take note of a group.

        Raises:
            RecordError: its id was used before.
        """
        number = self._numbers.setdefault(group.id, len(self._offsets))
        if number < len(self._offsets):
            raise RecordError(
                where,
                f"the prompt id {group.id!r:.100} was used before, at {self._where(number)}",
                "two records have the same prompt and answer: give them ids, or put their responses into one record"
                if hashed
                # A log of a run in which a prompt came again: the first are its oldest rollouts.
                else "keep the record of the newest step, as `cropi convert FOLDER --out FILE` does with a folder of "
                "logs (train-rank00000.jsonl) or of steps (0.jsonl, 1.jsonl), or give every prompt its own id"
                if "step" in group.extra
                else "give every prompt its own id, or pass --skip-bad to keep the first"
                if offset is not None
                else "give every prompt its own id; where a row is one response, put the files together into one, "
                "whose rows of a prompt become one record; or pass --skip-bad to keep the first",
            )
        self.by_offset &= offset is not None and not hashed
        self._sources.append(source)
        self._offsets.append(-1 if offset is None else offset)
        before = where.rstrip("0123456789")  # "file:" or "file, row "
        if offset is not None and len(before) < len(where):
            self._lines.append(int(where[len(before) :]))
            self._names[source] = before
        else:
            self._lines.append(-1)
            self._wheres[number] = where

    def _where(self, number: int) -> str:
        line = self._lines[number]
        return f"{self._names[self._sources[number]]}{line}" if line >= 0 else self._wheres[number]

    def remember(self, sources: Sequence[Source], columns: Mapping[str, str]) -> None:
        """Hold these places for :func:`kept_places`, if every source is a file with records in lines, or a table."""
        if self.by_offset and not columns and (key := _key(sources, columns)) is not None:
            _KEPT[key] = self
            _KEPT.move_to_end(key)
            while len(_KEPT) > 1 and (
                len(_KEPT) > _MOST or sum(len(one.ids()) for one in _KEPT.values()) > _MOST_PROMPTS
            ):
                _KEPT.popitem(last=False)

    def ids(self) -> KeysView[str]:
        """The ids of all prompts."""
        return self._numbers.keys()

    def in_order(self, ids: Iterable[str]) -> Iterator[tuple[int, list[str], list[int]]]:
        """Some ids in the order of the sources: the source's number, the ids in it, and their offsets."""
        numbers = self._numbers
        for source, part in groupby(
            sorted(ids, key=numbers.__getitem__), lambda name: self._sources[numbers[name]]
        ):
            names = list(part)
            yield source, names, [self._offsets[numbers[name]] for name in names]

    def reader(self, sources: Sequence[Source], stack: ExitStack) -> Callable[[str], PromptGroup]:
        """A function from an id to its group, which it reads from its line; the files stay open as long as ``stack``.

        It raises a CropiError where a file was changed.
        """
        files: dict[int, Any] = {}
        parse = RecordReader(rewards=None)  # the pass that noted the places has checked them

        def read(name: str) -> PromptGroup:
            number = self._numbers[name]
            source = self._sources[number]
            if source not in files:
                path = sources[source].lines_file()
                if path is None:
                    raise was_changed(sources[source])
                files[source] = stack.enter_context(open_to_read(path))
            files[source].seek(self._offsets[number])
            line = files[source].readline()
            try:
                group = parse(line, self._where(number))
            except RecordError:  # it was right when the place was noted
                group = None
            if group is None or group.id != name:
                raise was_changed(sources[source], f": {name!r:.100} is elsewhere")
            return group

        return read


def was_changed(source: Source, how: str = "") -> CropiError:
    """The error where a file is not what it was in the first pass."""
    return CropiError(f"{source.name} was changed while it was used{how}; run the same again")


def kept_places(sources: Sequence[Source], columns: Mapping[str, str]) -> Places | None:
    """The places that a full pass over these very files has noted, if the files have not changed since."""
    key = _key(sources, columns)
    return _KEPT.get(key) if key is not None else None


def all_lines(sources: Sequence[Source]) -> bool:
    """Whether every source is a file of lines."""
    return all(source.lines_file() is not None for source in sources)


def _key(sources: Sequence[Source], columns: Mapping[str, str]) -> tuple[Any, ...] | None:
    parts: list[Any] = sorted(columns.items())
    lines = all_lines(sources)
    for source in sources:
        path = source.lines_file() if lines else source.table_file()
        if path is None:
            return None
        try:
            state = os.stat(path)
        except OSError:  # gone since: whoever reads it says so
            return None
        parts.append((str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(parts)
