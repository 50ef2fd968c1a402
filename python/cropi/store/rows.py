"""What a store knows about a prompt, and its JSON in a shard's header."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from math import isfinite
from typing import Any, Literal

from cropi.errors import CropiError, shown
from cropi.form import is_writable

# With these three as its type, msgspec makes one string of a status, not one for every row.
Status = Literal["ok", "failed", "skipped"]
OK: Status = "ok"
FAILED: Status = "failed"
SKIPPED: Status = "skipped"
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "status": (str,), "reason": (str,), "set": (str, type(None)), "task": (str, type(None)),
    "pass_rate": (float, int), "tokens": (int,), "norm": (float, int), "row": (int, type(None)), "extra": (dict,),
}  # fmt: skip
DEFAULT_SET = "valid"  # of validation prompts that name none
SCORED_AT = "scored_at"  # of a row's ``extra`` (:mod:`cropi.store.earlier`)


@dataclass(frozen=True, slots=True)
class RowInfo:
    """What the store knows about one prompt. ``row`` is its place in the shard's tensor, or None without a
    sketch.

    ``status`` is "ok", "failed" (tried, and no usable sketch came out) or "skipped" (not tried); ``reason``
    says why.
    """

    id: str
    status: Status = OK
    reason: str = ""
    set: str | None = None
    task: str | None = None
    pass_rate: float = 0.0
    tokens: int = 0
    norm: float = 0.0
    row: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def set_name(self) -> str:
        """The validation set that the prompt is in."""
        return self.set or DEFAULT_SET


def check_characters(row: RowInfo) -> None:
    """Check that a row's text can be written; the shard that it is in could not be, with all of its other rows.

    Raises:
        CropiError: it holds half of a surrogate pair, or ``extra`` a value that JSON does not take.
    """
    for field_ in ("id", "set", "task", "reason", "extra"):
        value = getattr(row, field_)
        if not value or isinstance(value, str) and value.isascii():
            continue
        try:
            writable = is_writable(value)
        except (TypeError, ValueError) as error:
            raise CropiError(
                f"the {field_} {shown(value)} of the prompt {shown(row.id)} cannot be written as JSON ({error}); give "
                "text, numbers, and lists and dictionaries of them"
            ) from error
        if not writable:
            raise CropiError(
                f"the {field_} {shown(value)} has half of a surrogate pair, which is not a character: no file takes "
                "it; give another"
            )


def placed(row: RowInfo, place: int | None) -> RowInfo:
    """The row at another place."""
    return RowInfo(
        row.id,
        row.status,
        row.reason,
        row.set,
        row.task,
        row.pass_rate,
        row.tokens,
        row.norm,
        place,
        row.extra,
    )


def rows_to_json(rows: Sequence[RowInfo]) -> str:
    """The rows as a JSON list of objects."""
    return f"[{', '.join(map(_object, rows))}]"


def _object(row: RowInfo) -> str:
    """As ``json.dumps`` of the fields, in a third of its time: every prompt without a gradient passes here too."""
    return (
        f'{{"id": {_text(row.id)}, "status": {_text(row.status)}, "reason": {_text(row.reason)}, '
        f'"set": {_text_or_null(row.set)}, "task": {_text_or_null(row.task)}, '
        f'"pass_rate": {_number(row.pass_rate)}, "tokens": {_number(row.tokens)}, "norm": {_number(row.norm)}, '
        f'"row": {"null" if row.row is None else row.row}, '
        f'"extra": {json.dumps(row.extra, ensure_ascii=False) if row.extra else "{}"}}}'
    )


def _text(value: Any) -> str:
    return encode_basestring(value) if type(value) is str else json.dumps(value, ensure_ascii=False)


def _text_or_null(value: Any) -> str:
    return "null" if value is None else _text(value)


def _number(value: Any) -> str:
    return (
        repr(value) if type(value) is int or type(value) is float and isfinite(value) else json.dumps(value)
    )


def rows_from_json(text: str | bytes) -> list[RowInfo]:
    """The rows that :func:`rows_to_json` wrote.

    Raises:
        ValueError, TypeError: it is something else.
    """
    decoders = _decoders()
    if decoders is not None:
        try:
            return list(decoders[0].decode(text))
        except (ValueError, UnicodeError):  # NaN, which JSON of Python has and msgspec has not
            pass
    items = json.loads(text)
    if not isinstance(items, list):
        raise TypeError(f"a list of rows is expected, got {type(items).__name__}")
    rows = [RowInfo(**row) for row in items]
    for row in rows:
        for name, kinds in _TYPES.items():
            if type(getattr(row, name)) not in kinds:
                raise TypeError(f"a row has {name} = {shown(getattr(row, name))}")
        if not (isfinite(row.pass_rate) and isfinite(row.norm) and row.tokens.bit_length() < 64):
            raise ValueError(f"the row {shown(row.id)} has a number that is not finite")
    if not is_writable(items):
        raise ValueError("a row holds half a character")
    return rows


def from_json(text: bytes) -> Any:
    """As :func:`json.loads`."""
    decoders = _decoders()
    if decoders is not None:
        try:
            return decoders[1].decode(text)
        except (ValueError, UnicodeError):
            pass
    return json.loads(text)


@functools.cache
def _decoders() -> tuple[Any, Any] | None:
    """msgspec's, of rows and of anything, which take a tenth of the time; None where it is not installed."""
    try:
        from msgspec.json import Decoder
    except ImportError:
        return None
    return Decoder(list[RowInfo]), Decoder()
