"""Rows of a score table by columns: a million prompts are held in the memory of their numbers and ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np

from cropi.store.rows import RowInfo

FIELDS = {field.name for field in fields(RowInfo)}


class TableRows(Sequence[RowInfo]):
    """The prompts of a score table that was read; a row is made when it is asked for.

    Args:
        schema: of the table.
        count: how many there are.
        fields: the attribute of a row by the name of its column; other attributes are None.
        extra: columns that go to ``row.extra`` where they are not null. Files of the first release have none.
    """

    def __init__(self, schema: Any, count: int, fields: dict[str, str], extra: Sequence[str]) -> None:
        self.ids: list[str] = []
        kinds = {
            name: schema.field(name).type
            for name in (*fields, *extra)
            if name in schema.names or name in fields
        }
        self._columns = {key: _column(kinds[name], count) for name, key in fields.items() if key != "id"}
        self._extra = {name: _column(kinds[name], count) for name in extra if name in kinds}
        self._names = {key: name for name, key in fields.items()}
        self._unread = dict.fromkeys(FIELDS - {"id", "extra", *self._columns})
        self.columns = list(kinds)  # that are read

    def add(self, batch: Any) -> None:
        """Take the next rows, from an Arrow record batch."""
        ids = batch.column(self._names["id"]).to_pylist()
        if not all(type(one) is str for one in ids):
            raise TypeError("an id is not a string")
        for key, column in self._columns.items():
            column.fill(len(self.ids), batch.column(self._names[key]))
        for name, column in self._extra.items():
            column.fill(len(self.ids), batch.column(name))
        self.ids += ids

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


def values_of(rows: Sequence[RowInfo], key: str, places: np.ndarray) -> list[Any]:
    """One attribute of some rows, or their entry in ``extra`` of that name, else None.

    Rows that are held by columns are not made for it.
    """
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


def _column(kind: Any, count: int) -> _Texts | _Numbers:
    if kind in ("string", "large_string", "null"):
        return _Texts(count)
    return _Numbers(count, whole=kind == "int64")
