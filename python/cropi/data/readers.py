"""Prompt groups from whatever holds them: one function, :func:`read`, for files, hub data sets and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from cropi.data.columns import TableGroup
from cropi.data.fast import RecordReader
from cropi.data.forms import (
    CONVERSATION,
    RECORD,
    check_response,
    content_id,
    form_of,
    group_key,
    is_failed,
    joined,
    parse_columns,
    renamed,
    split_conversation,
)
from cropi.data.places import Places, all_lines, kept_places, was_changed
from cropi.data.records import WITH_REWARDS, PromptGroup, make_group
from cropi.data.sources import Row, Source, fields_of, is_blank, sources_of
from cropi.data.spilled import Spilled
from cropi.data.tables import TableRow, row_of_table
from cropi.errors import CropiError, RecordError, warn
from cropi.files import open_to_read

WITHOUT_REWARDS = (
    "the group holds demonstrations, without rewards",
    "name the --estimator sft, or leave it out",
)
MOST_FAILED = 1000  # rows at a file's head that are passed over in search of one that tells the file's form
NO_RECORD = "the file holds no trajectory record (one JSON object a line is expected)"
WITH_ID = "this record has an 'id', and those before it have none", "give all an id, or none"


class HashedIds(UserWarning):
    """Records without ids: they get one that is a hash of their prompt."""


def read(
    source: Any,
    *,
    skip_bad: bool = False,
    columns: str | Mapping[str, str] | None = None,
    name: str = "records",
    rewards: bool | None = True,
) -> PromptGroups:
    """The prompt groups of a source, which can be gone through again and again.

    Args:
        source: a path (JSON lines or a JSON array, plain or packed by gzip, zstd, bz2 or xz; parquet; arrow; a folder
            of ``save_to_disk``), ``-`` for standard input, a data set of the hub (``owner/name``, ``hf://...``), a
            list of any of these, a ``datasets.Dataset``, a pyarrow table, a pandas frame, a list of dictionaries or of
            groups, or what this function returned.
        skip_bad: leave bad records out, and count them in :attr:`PromptGroups.bad`, instead of raising.
        columns: names of columns, ``{"prompt": "question", "reward": "score"}`` or ``"prompt=question,reward=score"``.
        name: what messages call a source in memory.
        rewards: whether records must have rewards; False: they must have none, and hold demonstrations
            (``estimator="sft"``); None: some may.

    Raises:
        CropiError: nothing that can be read; what is wrong inside shows when the groups are gone through.

    Example:
        >>> groups = read([{"id": "a", "prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0]}])
        >>> [(group.id, group.size) for group in groups]
        [('a', 2)]
    """
    if isinstance(source, PromptGroups):
        return source
    return PromptGroups(
        sources_of(source, name), skip_bad=skip_bad, columns=parse_columns(columns), rewards=rewards
    )


@dataclass
class PromptGroups:
    """Prompt groups that are read anew each time they are gone through, one in memory at a time.

    Attributes:
        sources: where they come from, in order.
        skip_bad: leave bad records out, and count them.
        columns: names of columns.
        rewards: see :func:`read`.
        bad: the errors of the records that the last full pass left out.
    """

    sources: list[Source]
    skip_bad: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    rewards: bool | None = True
    bad: list[RecordError] = field(default_factory=list)
    # What cropi.data.scan.scan() counted in them; it counts once.
    scan: Any = field(default=None, repr=False)
    _told: bool = field(default=False, repr=False, compare=False)  # that ids are hashes

    @property
    def names(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.name for source in self.sources)

    def __iter__(self) -> Iterator[PromptGroup]:
        return self.each()

    def each(
        self,
        on_bad: Callable[[RecordError], None] | None = None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> Iterator[PromptGroup]:
        """Go through the groups.

        Args:
            on_bad: called with the error of every record that is left out.
            on_line: called with the bytes of every line as it is read (of a row of a table: with its record).

        Raises:
            RecordError: a malformed or inconsistent record, with ``file:line`` and the remedy.
            CropiError: a file is missing, unreadable, damaged or holds no record.
        """
        places, bad = Places(), list[RecordError]()
        state = _State(self.columns, on_line, self.rewards)
        for number, source in enumerate(self.sources):
            empty = True
            for where, offset, made in state.groups(source):
                empty = False
                try:
                    if isinstance(made, RecordError):
                        raise made
                    places.add(made, number, where, offset, state.hashed)
                except RecordError as error:
                    if not self.skip_bad:
                        raise error
                    bad.append(error)
                    if on_bad is not None:
                        on_bad(error)
                    continue
                yield made
            if empty:
                raise CropiError(f"{source.name}: {NO_RECORD}")
        if state.hashed and not self._told:
            self._told = True
            warn(
                f"{self.names}: the records have no 'id', so every prompt's id is a hash of its content; a prompt "
                "whose text changes is another one then, so give ids for a curriculum",
                HashedIds,
            )
        self.bad = bad
        places.remember(self.sources, self.columns)

    def take(self, ids: Iterable[str], *, missing_ok: bool = False) -> Iterator[PromptGroup]:
        """The groups with these ids, in this order.

        They are read by their places if a full pass over the same files has been made before; otherwise this is one.

        Args:
            ids: prompt ids.
            missing_ok: leave out ids that are not there.

        Raises:
            CropiError: an id is not there.
        """
        wanted = list(ids)
        with self._found(set(wanted)) as (there, find):
            if not missing_ok:
                self._check_there(wanted, there)
            for name in wanted:
                if name in there:
                    yield find(name)

    def check_holds(self, ids: Iterable[str]) -> None:
        """Check that :meth:`take` would find all of these ids.

        Raises:
            CropiError: an id is not there.
        """
        wanted = list(ids)
        with self._found(set(wanted)) as (there, _):
            self._check_there(wanted, there)

    def _check_there(self, wanted: Sequence[str], there: Collection[str]) -> None:
        absent = [name for name in wanted if name not in there]
        if absent:
            raise CropiError(
                f"{len(absent)} selected prompts are not in {self.names}, for example {absent[0]!r:.100}; give the "
                "files that the training store was made from"
            )

    @contextmanager
    def lookup(self) -> Iterator[Callable[[str], PromptGroup]]:
        """A function from an id to its group, inside the ``with`` block."""
        with self._found(None) as (_, find):
            yield find

    @contextmanager
    def _found(self, ids: set[str] | None) -> Iterator[tuple[Collection[str], Callable[[str], PromptGroup]]]:
        """The ids that are there, of those that are asked for, and a function that gives the group with an id."""
        places = kept_places(self.sources, self.columns)
        with ExitStack() as stack:
            if places is not None and all_lines(self.sources):
                yield places.ids(), places.reader(self.sources, stack)
                return
            kept, held = stack.enter_context(closing(Spilled())), dict[str, int]()
            for group in (
                self.each() if places is None or ids is None else self.at(places, ids & places.ids())
            ):
                if ids is None or group.id in ids:
                    held[group.id] = kept.put(group)
            yield held.keys(), lambda name: kept.get(held[name])

    def at(self, places: Places, ids: Iterable[str]) -> Iterator[PromptGroup]:
        """The groups with these ids, in the order of the sources, read from the places that a full pass has noted.

        Raises:
            CropiError: a file was changed meanwhile.
        """
        if all_lines(self.sources):
            with ExitStack() as stack:
                find = places.reader(self.sources, stack)
                for _, names, _ in places.in_order(ids):
                    yield from map(find, names)
            return
        state = _State({}, None, self.rewards)
        for number, names, offsets in places.in_order(ids):
            rows = self.sources[number].table_rows(offsets)
            for name, given in zip_longest(names, rows):
                group = None if given is None else state._record(given[2], given[0])
                if group is None or group.id != name:
                    raise was_changed(self.sources[number])
                yield group


class _State:
    """What one pass over several sources has to remember."""

    def __init__(
        self, columns: Mapping[str, str], on_line: Callable[[bytes], None] | None, rewards: bool | None = True
    ) -> None:
        self.columns, self.given, self.on_line, self.rewards = columns, columns, on_line, rewards
        self.reader = RecordReader(rewards)
        self.hashed: bool | None = None  # whether the records have no ids; None before the first

    def groups(self, source: Source) -> Iterator[tuple[str, int | None, Any]]:
        """``(where, offset, group or the error in its place)`` of every record."""
        self.columns = {} if source.converted else self.given
        table = source.table_file() if self.on_line is not None else None
        if table is not None:
            self._tell_file(table)
        given = source.rows() if self.columns else source.grouped_rows()
        rows = self._told(given, table is not None)
        first = next(rows, None)
        if first is None:
            return
        held = [first]
        while self._failed(held[-1]) and len(held) < MOST_FAILED and (row := next(rows, None)) is not None:
            held.append(row)
        form = self._form(held[0] if self._failed(held[-1]) else held[-1])
        rows = chain(held[1:], rows)
        if form == RECORD:
            for where, offset, row in chain([first], rows):
                try:
                    yield where, offset, self._record(row, where)
                except RecordError as error:
                    yield where, offset, error
        else:
            yield from self._grouped(form, first, rows)

    def _tell_file(self, path: Path) -> None:
        assert self.on_line is not None
        with open_to_read(path) as file:
            while part := file.read(2**20):
                self.on_line(part)

    def _told(self, rows: Iterator[Row], told: bool) -> Iterator[Row]:
        """The rows that are not blank; their bytes are told unless the file's have been."""
        for where, offset, row in rows:
            if isinstance(row, bytes):
                if self.on_line is not None:
                    self.on_line(row)
                if is_blank(row):
                    continue
            elif self.on_line is not None and not told and not isinstance(row, RecordError):
                text = row.raw if isinstance(row, PromptGroup) else json.dumps(row, default=repr)
                self.on_line(text.encode("utf-8", "backslashreplace") + b"\n")
            yield where, offset, row

    def _failed(self, row: Row) -> bool:
        where, _, held = row
        if isinstance(held, (PromptGroup, RecordError)):
            return False
        try:
            return is_failed(dict.fromkeys(self.columns) | self._dictionary(held, where, whole=True))
        except RecordError:
            return False

    def _form(self, first: Row) -> str:
        where, _, row = first
        if isinstance(row, PromptGroup):
            return RECORD
        try:
            whole = self._dictionary(row, where, whole=True)
            return form_of(dict.fromkeys(self.columns) | whole, where, rewards=self.rewards)
        except RecordError:
            return RECORD  # the error comes again, when the record is read

    def _dictionary(self, row: Any, where: str, *, whole: bool = False) -> dict[str, Any]:
        """A row by its columns; ``whole``: of a table, those without a value too, by which its form is known."""
        held = fields_of(row, where)
        made = renamed(held, self.columns, where) if self.columns else dict(held)
        return row_of_table(made) if isinstance(row, TableRow) and not whole else made

    def _record(self, row: Any, where: str) -> PromptGroup:
        if isinstance(row, TableGroup):
            if self.hashed:
                raise RecordError(where, *WITH_ID)
            self.hashed = False
        if isinstance(row, PromptGroup):
            if self.rewards is not None and row.demonstrations is self.rewards:
                raise RecordError(where, *(WITHOUT_REWARDS if self.rewards else WITH_REWARDS))
            return row
        if isinstance(row, bytes) and not self.columns and not self.hashed:
            try:
                group = self.reader(row, where)
            except RecordError as error:
                if self.hashed is False or not error.problem.startswith("the key 'id' is "):
                    raise
            else:
                self.hashed = False
                return group
        line = row if isinstance(row, bytes) and not self.columns else None
        return self._named_record(self._dictionary(row, where), where, line)

    def _named_record(self, record: dict[str, Any], where: str, line: bytes | None = None) -> PromptGroup:
        if self.hashed is None:
            self.hashed = "id" not in record
        if self.hashed and record.get("id") is not None:
            raise RecordError(where, *WITH_ID)
        name = content_id(record) if self.hashed else None
        return make_group(record, where, line=line, default_id=name, rewards=self.rewards)

    def _grouped(self, form: str, first: Row, rows: Iterator[Row]) -> Iterator[tuple[str, None, Any]]:
        """Rows of one response each, kept in a temporary file until all rows of their prompt are there."""
        places: dict[str, list[int]] = {}
        with closing(Spilled()) as kept:
            for where, _, row in chain([first], rows):
                try:
                    made = self._dictionary(row, where)
                    if form == CONVERSATION:
                        made = split_conversation(made, where)
                    else:
                        check_response(made, where)
                except RecordError as error:
                    yield where, None, error
                    continue
                places.setdefault(group_key(made), []).append(kept.put((where, made)))
            for offsets in places.values():
                held = [kept.get(offset) for offset in offsets]
                wheres = [where for where, _ in held]
                try:
                    record = joined([row for _, row in held], wheres)
                    yield wheres[0], None, self._named_record(record, wheres[0])
                except RecordError as error:
                    yield wheres[0], None, error


def first_row(path: str | Path) -> tuple[str, dict[str, Any]]:
    """``(where, row)`` of the first row of a file that is not blank, and is no failed response, if there is one.

    Raises:
        CropiError: not a file that is read, or an empty one.
        RecordError: the row is not a JSON object.
    """
    begun = list[tuple[str, dict[str, Any]]]()
    for where, row in islice(_dictionaries(path, whole=True), MOST_FAILED):
        if not is_failed(row):
            return where, row
        begun.append((where, row))
    if begun:
        return begun[0]
    raise CropiError(f"{path}: {NO_RECORD}")


def rows_without_checks(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file or a folder of ``save_to_disk`` as dictionaries, whatever they hold.

    Raises:
        CropiError: not a file that is read.
        RecordError: a row is not a JSON object.
    """
    return (row for _, row in _dictionaries(path))


def _dictionaries(path: str | Path, *, whole: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of every row that is not blank."""
    state = _State({}, None, None)
    for source in sources_of(path):
        for where, _, row in state._told(source.rows(), False):
            yield where, state._dictionary(row, where, whole=whole)
