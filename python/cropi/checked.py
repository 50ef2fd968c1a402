"""Options are of the types that their fields name: checked when they are given, not after hours when they are used."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from cropi.errors import CropiError, article

WORDS: dict[Any, str] = {
    int: "an integer", float: "a finite number", str: "a string", Path: "a path", bool: "True or False",
    type(None): "None",
}  # fmt: skip


def check_fields(options: Any, before: str = "") -> None:
    """Check every field of a dataclass against its annotation.

    Whole and decimal numbers of NumPy are taken, and stored as Python's, so that the options can be written as JSON. A
    truth value is not a number, a number is not a truth value, and a string is not a list of strings.

    Args:
        options: an instance of a dataclass, which may be frozen.
        before: what messages begin with.

    Raises:
        CropiError: names the field, what it must be, what was given and the remedy.
    """
    hints = get_type_hints(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if not fits(value, hints[field.name]):
            wanted = hints[field.name]
            raise CropiError(
                f"{before}{field.name} must be {in_words(wanted)}, got {value!r:.200}{_remedy(value, wanted)}"
            )
        if type(value) not in (bool, int, float) and isinstance(value, Real):
            plain = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(options, field.name, plain)


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotation's type."""
    origin = get_origin(wanted)
    if wanted is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(wanted))
    if wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is int:
        return type(value) is not bool and isinstance(value, Integral)
    if wanted is float:
        return type(value) is not bool and isinstance(value, Real) and _is_finite(value)
    if origin in (Sequence, list, tuple):
        part = (get_args(wanted) or (Any,))[0]
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        return listed and all(fits(item, part) for item in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    try:
        return isinstance(value, wanted)
    except TypeError:  # an annotation that says more than a type, which others have to check
        return True


def _is_finite(value: Real) -> bool:
    """Also that it is a number for NumPy, which makes an object of an integer of more bits."""
    return abs(int(value)) < 1 << 63 if isinstance(value, Integral) else math.isfinite(value)


def in_words(wanted: Any) -> str:
    """What a type is called in messages."""
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in get_args(wanted)))
    if origin in (Sequence, list, tuple):
        parts = get_args(wanted)
        return f"a list (of {in_words(parts[0])} each)" if parts else "a list"
    if origin in (Mapping, dict):
        return "a table of keys and values"
    return WORDS.get(wanted) or article(getattr(wanted, "__name__", str(wanted)))


def _remedy(value: Any, wanted: Any) -> str:
    if not isinstance(value, str):
        return ""
    parts = get_args(wanted) or (wanted,)
    if float in parts or int in parts:
        if is_number(value):
            return "; it is text: leave the quotes out (in YAML, 1e-6 is text and 1.0e-6 a number)"
    if any(get_origin(part) in (Sequence, list, tuple) for part in (wanted, *parts)):
        return f"; for one, write [{value!r}]"
    return ""


def is_number(text: str) -> bool:
    """Whether a text would be a finite number without its quotes."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_id(value: Any) -> bool:
    """Whether a value can name a prompt: a string or an integer, which are found again in files and checkpoints."""
    return isinstance(value, (str, Integral)) and not isinstance(value, bool)


def absent(value: Any) -> bool:
    """Whether a value stands for none: None, or NaN, as tables have it in an empty cell."""
    return value is None or (isinstance(value, Real) and bool(value != value))
