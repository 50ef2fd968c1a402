"""Values of any kind, from datasets and dumps, in the types that JSON has."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from cropi.errors import CropiError

AS_TEXT = (decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath, datetime.timedelta)
LARGEST, DEEPEST = 1_000_000, 100
REMEDY = "leave the column out of Recording(columns=...), or turn it into text or numbers in the dataset"


def plain_value(value: Any, where: str) -> Any:
    """A value of a dataset in JSON's types.

    Dates and times become text in ISO form, decimals and fractions their digits, bytes base64, numbers of NumPy and
    tensors plain numbers and lists; NaN, which a table has where there is nothing, becomes null.

    Args:
        value: anything.
        where: named in the message.

    Raises:
        CropiError: an object that has no form in JSON (an image, say).
    """
    return _plain(value, where, [LARGEST], 0)


def _plain(value: Any, where: str, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        raise CropiError(
            f"{where}: a value of more than {LARGEST} parts, or nested more than {DEEPEST} deep, is not written into a "
            f"record; {REMEDY}"
        )

    def inside(part: Any) -> Any:
        return _plain(part, where, left, depth + 1)

    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(value)
    if isinstance(value, enum.Enum):
        return inside(value.value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, AS_TEXT):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, Mapping):
        return {whole_text(str(key)): inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [inside(item) for item in sorted(value, key=repr)]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # NumPy and torch
        return inside(value.tolist())
    raise CropiError(
        f"{where}: a value of type {type(value).__name__:.60} cannot be written into a record; {REMEDY}"
    )


def text_value(value: Any, where: str) -> str | None:
    """The same where the record takes a string (``task``): other values become their JSON text."""
    plain = plain_value(value, where)
    return plain if plain is None or isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def whole_text(text: str) -> str:
    """A text without halves of surrogate pairs, which no file takes: each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
