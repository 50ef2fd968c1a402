"""Rows of a dump in any form that tables have: JSON lines or an array, packed or not, parquet, arrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.forms import hashed
from cropi.data.sources import PathSource, fields_of, is_blank
from cropi.data.tables import TableRow, row_of_table
from cropi.errors import RecordError
from cropi.form import nested
from cropi.trainers.dumps.fields import BadSample, Left, finite, listed, names, prompt_id, shown


def rows_of_dump(path: Path, left: Left) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file:line, object)`` of every row; keys of a table's row that hold nothing are left out.

    Raises:
        CropiError: not a file that is read.
        BadSample: a line is not UTF-8, not JSON, or no object.
    """
    for where, _, row in PathSource(path).rows():
        if not is_blank(row):
            yield from left.each([(where, row)], _parsed)


def _parsed(pair: tuple[str, Any]) -> tuple[str, dict[str, Any]]:
    where, row = pair
    try:
        held = fields_of(row, where)
    except RecordError as error:
        raise BadSample(where, "line" if isinstance(row, bytes) else "row", error.problem) from None
    return where, row_of_table(held) if isinstance(row, TableRow) else held


def rows_of_columns(pair: tuple[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a line that holds columns, each a list.

    Raises:
        BadSample: there is none, or they have several lengths.
    """
    where, line = pair
    columns = {str(key): listed(value, shown(str(key)), where) for key, value in line.items()}
    sizes = {len(values) for values in columns.values()}
    if len(sizes) != 1:
        lengths = ", ".join(f"{shown(name)} {len(values)}" for name, values in columns.items())
        raise BadSample(where, "line", f"should hold columns of one length, got {lengths or 'none':.300}")
    return [
        (f"{where}, response {i}", {name: values[i] for name, values in columns.items()})
        for i in range(*sizes)
    ]


def id_of(row: Any, id_key: str | None, prompt: Any, where: str) -> str:
    """The prompt's id: what stands at ``id_key``, or a hash of the prompt.

    Raises:
        BadSample: there is nothing at ``id_key``.
    """
    if id_key is None:
        return hashed(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=repr))
    value = row.get(id_key) if id_key in row else nested(row, id_key)
    if value is None:
        raise without_id(row, id_key, where)
    return prompt_id(value, id_key[:80], where)


def without_id(row: Mapping[str, Any], id_key: str, where: str) -> BadSample:
    """The error for a row with nothing at ``id_key``; it names the keys that stand there instead."""
    beside = nested(row, id_key.rpartition(".")[0])
    held = names(beside if isinstance(beside, Mapping) else row)
    return BadSample(where, id_key[:80], f"is missing, which --id-key names; there are {held}")


def reward_of(value: Any, field: str, where: str) -> float:
    """A reward: a number, or one a token, which are added up.

    Raises:
        BadSample: it is missing, or neither.
    """
    if value is None:
        raise BadSample(
            where, field, "is missing: the responses are not scored",
            "score them, and write a number for every response under this key, or pass --skip-bad",
        )  # fmt: skip
    if isinstance(value, list):
        return sum(finite(one, f"{field}[{t}]", where) for t, one in enumerate(value))
    return finite(value, field, where)


def named_reward(row: Mapping[str, Any], columns: str, where: str) -> float:
    """The reward in the column that ``--columns reward=`` names, or the sum of several (``a+b``).

    Raises:
        BadSample: there is no such column, or it holds no number.
    """
    total = 0.0
    for name in [columns] if columns in row else columns.split("+"):
        if row.get(name) is None:
            raise BadSample(
                where,
                "reward",
                f"there is no {shown(name)}, which --columns reward= names; there are {names(row)}",
            )
        total += finite(row[name], name[:80], where)
    return total


def text_of(value: Any, field: str, where: str) -> str:
    """Text that is not empty.

    Raises:
        BadSample: it is something else.
    """
    if not isinstance(value, str) or not value:
        raise BadSample(where, field, f"should be text, got {shown(value)}")
    return value
