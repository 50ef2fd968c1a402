"""The form of JSON values that are read back. A checksum says that a file is whole, not that its values make sense:
another hand may have sealed it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from inspect import isfunction
from typing import Any

from cropi.checked import fits, in_words
from cropi.errors import CropiError, printable, shown


def nested(value: Any, way: str | Sequence[str], missing: Any = None) -> Any:
    """What stands where some keys lead, joined by dots or one by one; ``missing`` where the way ends.

    >>> nested({"spec": {"dim": 64}}, "spec.dim"), nested({"spec": None}, "spec.dim")
    (64, None)
    """
    for key in way.split(".") if isinstance(way, str) else way:
        value = value.get(key, missing) if isinstance(value, Mapping) else missing
    return value


def check_form(values: Any, form: Any, said: str, remedy: str, place: str = "it") -> None:
    """Check what a file holds, or one place of it; see :func:`wrong_form`.

    Raises:
        CropiError: ``said``, the first field that is not of the form, and the remedy.
    """
    if wrong := wrong_form(values, form, place):
        raise CropiError(f"{said}: {wrong}; {remedy}")


def wrong_form(value: Any, form: Any, place: str = "it") -> str:
    """The first field that is not of a form, in words; "" where all are.

    Args:
        value: of JSON's types.
        form: None, or an annotation as of :func:`cropi.checked.fits`; ``[form]`` for a list; ``{str: form}`` for an
            object of any names; ``{"name": form}`` for one that has these ("name?": it may be missing; other names may
            stand beside them); a tuple of forms, one of which fits; or a function, which says whether a value will do.
        place: what messages call the value.

    >>> wrong_form({"spec": {"dim": "64"}}, {"spec": {"dim": int}, "notes?": {str: str}})
    "spec.dim is '64' and must be an integer"
    """
    if form is None:
        return "" if value is None else f"{place} is {shown(value)} and must be null"
    if isinstance(form, tuple):
        first = ""
        for one in form:
            if not (wrong := wrong_form(value, one, place)):
                return ""
            first = first or wrong
        return first
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is {shown(value)} and must be a list"
        return _first(wrong_form(one, form[0], f"{place}[{i}]") for i, one in enumerate(value))
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} is {shown(value)} and must be a table of keys and values"
        return _first(_wrong_part(value, name, part, place) for name, part in form.items())
    if _is_plain(value) and (form(value) if isfunction(form) else fits(value, form)):
        return ""
    must = "" if isfunction(form) else f" and must be {in_words(form)}"
    return f"{place} is {shown(value)}{must}"


def _wrong_part(value: dict[str, Any], name: Any, form: Any, place: str) -> str:
    if name is str:
        if not all(map(is_writable, value)):
            return f"a name below {place} holds half a character"
        return _first(wrong_form(part, form, _below(place, key)) for key, part in value.items())
    key = name.removesuffix("?")
    if key in value:
        return wrong_form(value[key], form, _below(place, key))
    return "" if name != key else f"{_below(place, key)} is missing"


def _below(place: str, key: str) -> str:
    key = printable(key[:60])
    return key if place == "it" else f"{place}.{key}"


def _first(wrongs: Iterable[str]) -> str:
    return next(filter(None, wrongs), "")


def _is_plain(value: Any) -> bool:
    """Not an integer of so many digits that Python refuses to show it, or what is computed from it, nor a text that
    cannot be written."""
    if isinstance(value, str):
        return is_writable(value)
    return not isinstance(value, int) or value.bit_length() <= 64


def is_writable(values: Any) -> bool:
    """Whether values of JSON's types can be written as UTF-8: half a character, which JSON may name, cannot."""
    try:
        (values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_noted(name: str) -> None:
    """Check that what is noted of a job can name this file or word.

    Raises:
        CropiError: it is not UTF-8.
    """
    if not is_writable(name):
        raise CropiError(
            f"{shown(name, 500)} is not UTF-8, as what is noted of a job has to be; rename the file"
        )


def is_number(value: Any) -> bool:
    """Whether a value is a float, a finite one or not (what is not known is written as NaN), or an integer of that
    range."""
    return isinstance(value, float) or fits(value, float)
