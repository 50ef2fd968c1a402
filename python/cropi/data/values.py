"""Values of tables and of Python programs as the values of JSON."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from cropi.errors import CropiError, shown


def python_value(value: Any) -> Any:
    """A value without arrays, tensors, tuples and numpy numbers, at the depth that the fields of a record have."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [
            inner.tolist()
            if hasattr(inner, "tolist")
            else python_value(inner)
            if isinstance(inner, tuple)
            else inner
            for inner in value
        ]
    return value


def without_empty(value: Any) -> Any:
    """A value of a table without the keys that hold nothing: a table has one in every row for each key of any row.

    So a call of a tool with the arguments ``{"a": 1}`` has ``{"a": 1, "b": None}`` beside another with ``{"b": 2}``.
    """
    if isinstance(value, Mapping):
        return {key: without_empty(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_empty(inner) for inner in value]
    return value


def json_value(value: Any, name: str, row: object) -> Any:
    """A value of a table as JSON has it: dates become ISO text, NaN becomes null.

    Raises:
        CropiError: bytes, an infinity or another value that JSON cannot hold; ``name`` and ``row`` say where.
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(inner, f"{name}.{key}", row) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(inner, name, row) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise CropiError(
            f"format jsonl: row {row} has an infinity in {name!r}, which JSON cannot hold; use parquet"
        )
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    raise CropiError(
        f"format jsonl: row {row} has a value in {name!r} that JSON cannot hold, {shown(value)}; use parquet"
    )
