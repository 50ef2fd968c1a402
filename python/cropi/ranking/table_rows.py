"""Rows of a score table by columns: a million prompts are held in the memory of their numbers and ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np

from cropi.errors import shown
from cropi.ranking.repeated import Hashes
from cropi.store.rows import FAILED, OK, SCORED_AT, SKIPPED, RowInfo

STATUSES = {OK, FAILED, SKIPPED}
TEXTS = {"set", "task", "status", "reason", "file", SCORED_AT}  # the other columns are numbers
REQUIRED = {"status", "reason", "pass_rate", "tokens", "norm"}  # that every row has
FIELDS = {field.name for field in fields(RowInfo)}


class TableRows(Sequence[RowInfo]):
    """The prompts of a score table that was read; a row is made when it is asked for.

    Args:
        schema: of the table.
        count: how many there are.
        fields: the attribute of a row by the name of its column; other attributes are None.
        extra: columns that go to ``row.extra`` where they are not null.
    """

    def __init__(self, schema: Any, count: int, fields: dict[str, str], extra: Sequence[str]) -> None:
        self.ids: list[str] = []
        there = set(schema.names)
        self._columns = {key: _column(key, count) for key in fields.values() if key != "id"}
        self._extra = {name: _column(name, count) for name in extra if name in there}
        self._names = {key: name for name, key in fields.items()}
        self._unread = dict.fromkeys(FIELDS - {"id", "extra", *self._columns})
        self.columns = [*fields, *self._extra]  # that are read

    def add(self, batch: Any) -> None:
        """Take the next rows, from an Arrow record batch."""
        ids = batch.column(self._names["id"]).to_pylist()
        if not set(map(type, ids)) <= {str}:
            raise TypeError("an id is not a string")
        for key, column in self._columns.items():
            column.fill(len(self.ids), batch.column(self._names[key]))
        for name, column in self._extra.items():
            column.fill(len(self.ids), batch.column(name))
        self.ids += ids

    def check(self) -> None:
        """Check the columns that were read.

        Raises:
            ValueError: a prompt twice, a column of another kind, or a value that no prompt has.
        """
        if (twice := Hashes(self.ids).repeated(self.ids)) is not None:
            raise ValueError(f"the prompt {shown(twice[0])} is there {twice[1]} times")
        for key in REQUIRED & self._columns.keys():
            column = self._columns[key]
            wrong = column.wrong
            if key == "status" and isinstance(column, _Texts) and not wrong and column.texts - STATUSES:
                wrong = f"{shown((column.texts - STATUSES).pop())}, not one of {', '.join(sorted(STATUSES))}"
            if wrong:
                raise ValueError(f"a value of the column {self._names[key]} is {wrong}")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> RowInfo: ...
    @overload
    def __getitem__(self, place: slice) -> list[RowInfo]: ...

    def __getitem__(self, place: int | slice) -> RowInfo | list[RowInfo]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        held: dict[str, Any] = self._unread | {key: column[place] for key, column in self._columns.items()}
        extra = {name: value for name, column in self._extra.items() if (value := column[place]) is not None}
        return RowInfo(self.ids[place], extra=extra, **held)

    def __iter__(self) -> Iterator[RowInfo]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other))
        )

    __hash__ = None  # type: ignore[assignment]

    def values(self, key: str, places: np.ndarray) -> list[Any]:
        """One attribute of some rows."""
        if key == "id":
            return [self.ids[i] for i in places.tolist()]
        column = (self._columns | self._extra)[key] if key in self._columns or key in self._extra else None
        return [None if column is None else column[i] for i in places.tolist()]


def values_of(rows: Sequence[RowInfo], key: str, places: np.ndarray | None = None) -> list[Any]:
    """One attribute of some rows (None: of all), or their entry in ``extra`` of that name, else None.

    Rows that are held by columns are not made for it.
    """
    places = np.arange(len(rows)) if places is None else places
    if isinstance(rows, TableRows):
        return rows.values(key, places)
    if key not in FIELDS:
        return [rows[i].extra.get(key) for i in places.tolist()]
    return [getattr(rows[i], key) for i in places.tolist()]


class _Texts:
    """A column of few texts, or null: a number a row."""

    def __init__(self, count: int) -> None:
        self._numbers: dict[str | None, int] = {}
        self._texts: list[str | None] = []
        self._codes = np.empty(count, dtype=np.int32)

    def fill(self, begin: int, column: Any) -> None:
        coded = column.cast("string").dictionary_encode()
        texts = [*coded.dictionary.to_pylist(), None]
        for text in texts:
            if text not in self._numbers:
                self._numbers[text] = len(self._texts)
                self._texts.append(text)
        codes = np.array([self._numbers[text] for text in texts], dtype=np.int32)
        here, missing = self._codes[begin : begin + len(column)], _missing(column)
        here[missing] = codes[-1]
        here[~missing] = codes[numbers_of(coded.indices.drop_null(), "int64")]

    def __getitem__(self, place: int) -> str | None:
        return self._texts[self._codes[place]]

    @property
    def texts(self) -> set[str | None]:
        """Which there are."""
        return {self._texts[code] for code in np.unique(self._codes).tolist()}

    @property
    def wrong(self) -> str:
        """What is wrong with a column that every row has; "" if nothing is."""
        return "missing" if None in self.texts else ""


class _Numbers:
    """A column of numbers, or null."""

    def __init__(self, count: int, whole: bool) -> None:
        self._values = np.zeros(count, dtype=np.int64 if whole else np.float64)
        self._missing: np.ndarray | None = None

    def fill(self, begin: int, column: Any) -> None:
        missing = fill_numbers(self._values[begin : begin + len(column)], column)
        if missing is not None:
            if self._missing is None:
                self._missing = np.zeros(len(self._values), dtype=bool)
            self._missing[begin : begin + len(column)] = missing

    @property
    def wrong(self) -> str:
        """As of texts."""
        if self._missing is not None and self._missing.any():
            return "missing"
        return "" if np.isfinite(self._values).all() else "not a finite number"

    def __getitem__(self, place: int) -> int | float | None:
        if self._missing is not None and self._missing[place]:
            return None
        value: int | float = self._values[place].item()
        return value


def numbers_of(column: Any, kind: str) -> np.ndarray:
    """A column of numbers without nulls, by its memory: Arrow's own conversion imports pandas, which takes 50 MB."""
    if not len(column):
        return np.empty(0, dtype=kind)
    column = column.cast(kind)
    return np.frombuffer(column.buffers()[1], dtype=kind)[column.offset : column.offset + len(column)]


def fill_numbers(into: np.ndarray, column: Any) -> np.ndarray | None:
    """Put the numbers of a column into an array; gives where it is null, bool, and None where it is nowhere."""
    kind = into.dtype.name
    if not column.null_count:
        into[:] = numbers_of(column, kind)
        return None
    missing = _missing(column)
    into[~missing] = numbers_of(column.drop_null(), kind)
    return missing


def _missing(column: Any) -> np.ndarray:
    return numbers_of(column.is_null(), "uint8").view(bool)


def _column(key: str, count: int) -> _Texts | _Numbers:
    return _Texts(count) if key in TEXTS else _Numbers(count, whole=key == "tokens")
