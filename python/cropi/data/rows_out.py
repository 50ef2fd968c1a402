"""Rows to files that trainers read: JSON lines and parquet, with the columns of all rows and with errors in words."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.atomic import replacing
from cropi.data.spilled import Rows
from cropi.data.values import json_value
from cropi.errors import CropiError, optional

# From this size on, a column of text has offsets that 32 bits do not hold once its parts are put together.
LARGEST_COLUMN = 2**31 - 1
PART = 1024  # rows that are looked at together


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    """The rows as columns: every column that any row has, with None where a row lacks it."""
    names = dict.fromkeys(key for row in rows for key in row)
    if isinstance(rows, Rows):
        return {name: Column(rows, name) for name in names}
    return {name: [row.get(name) for row in rows] for name in names}


class Column(Sequence[Any]):
    """A column of rows, of which one value at a time is in memory."""

    def __init__(self, rows: Rows, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._rows[place].get(self._name)


def write_jsonl(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines. Dates become ISO text and NaN becomes null.

    Raises:
        CropiError: a value that JSON has no form for; the message names the column.
    """
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows):
            made = {key: json_value(value, key, number) for key, value in row.items()}
            try:
                file.write(json.dumps(made, ensure_ascii=False, allow_nan=False) + "\n")
            except (ValueError, UnicodeEncodeError, RecursionError) as error:
                raise CropiError(
                    f"format jsonl: row {number} cannot be written ({str(error)[:200]})"
                ) from None


def write_parquet(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as parquet, with the columns of all of them.

    Raises:
        CropiError: a column whose values have no common type; the message names it.
    """
    table = table_of(rows)
    with replacing(out) as temporary:
        optional("pyarrow.parquet").write_table(table, temporary)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a pyarrow table.

    Raises:
        CropiError: a column whose values have no common type, or none that parquet can hold.
    """
    pyarrow = optional("pyarrow")
    made = {}
    for name, values in columns_of(rows).items():
        try:
            column = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, RecursionError) as error:
            raise CropiError(
                f"format parquet: the values of the column {name!r} do not fit into a column of one type "
                f"({' '.join(str(error).split())[:200]}); use jsonl, or give them one type"
            ) from None
        _check_type(column.type, name)
        made[name] = column
    return pyarrow.table(made)


def check_table(rows: Rows) -> None:
    """Check that rows can be a pyarrow table, some in memory at a time.

    Raises:
        CropiError: as :func:`table_of`.
    """
    pyarrow, kinds = optional("pyarrow"), dict[str, Any]()
    for start in range(0, len(rows), PART):
        part = [rows[place] for place in range(start, min(start + PART, len(rows)))]
        for name, values in columns_of(part).items():
            try:
                kind = pyarrow.array(values).type
            except Exception:
                kind = None
            if kind is None or kind != pyarrow.null() and kinds.setdefault(name, kind) != kind:
                table_of(rows)  # each type by all values
                return
    for name, kind in kinds.items():
        _check_type(kind, name)


def taken(table: Any, places: Sequence[int]) -> Any:
    """Rows of a pyarrow table, in this order, with its schema; columns may be larger than 2 GiB."""
    pyarrow = optional("pyarrow")
    if table.nbytes <= LARGEST_COLUMN:
        return table.take(pyarrow.array(places, pyarrow.int64()))
    # take() puts the parts of a column together, whose offsets then do not fit into 32 bits: rows are cut one by one.
    return pyarrow.concat_tables([table.slice(place, 1) for place in places]) if places else table.slice(0, 0)


def rows_of(table: Any, places: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Rows of a table as dictionaries, some in memory at a time."""
    if isinstance(table, Rows):
        return table.taken(places)
    parts = (taken(table, places[start : start + 256]) for start in range(0, len(places), 256))
    return itertools.chain.from_iterable(part.to_pylist() for part in parts)


def check_json(schema: Any, path: str | Path) -> None:
    """Check that the rows of a table can be written as JSON.

    Raises:
        CropiError: a column of bytes or of durations; the message names it.
    """
    types = optional("pyarrow").types
    for name, kind in _leaves(schema):
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            raise CropiError(
                f"format jsonl: {path} has bytes in its column {name!r}, which JSON cannot hold; use parquet"
            )
        if types.is_duration(kind):
            raise CropiError(f"format jsonl: {path} has durations in its column {name!r}; use parquet")


def _check_type(kind: Any, name: str) -> None:
    types = optional("pyarrow").types
    if types.is_struct(kind):
        if kind.num_fields == 0:
            raise CropiError(
                f"format parquet: the objects in {name!r} are all empty, which parquet cannot hold; use jsonl, or "
                "leave them out"
            )
        for field in kind:
            _check_type(field.type, f"{name}.{field.name}")
    elif types.is_list(kind) or types.is_large_list(kind):
        _check_type(kind.value_type, name)


def _leaves(schema: Any) -> Iterable[tuple[str, Any]]:
    types = optional("pyarrow").types
    waiting = [(field.name, field.type) for field in schema]
    while waiting:
        name, kind = waiting.pop()
        if types.is_struct(kind):
            waiting += [(f"{name}.{field.name}", field.type) for field in kind]
        elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            waiting.append((name, kind.value_type))
        else:
            yield name, kind
