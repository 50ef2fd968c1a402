"""Times, sizes and settings in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TIMES = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


def duration(seconds: float) -> str:
    """A time.

    >>> duration(7500.0), duration(0.0312)
    ('2.08 hours', '0.0312 seconds')
    """
    return _amount(seconds, _TIMES, 2.0)


def size(count: float) -> str:
    """A number of bytes.

    >>> size(1.31e9), size(49200)
    ('1.31 GB', '49.2 kB')
    """
    return _amount(count, _SIZES, 1.0)


def counted(count: int, name: str) -> str:
    """A number of things.

    >>> counted(1, "prompt"), counted(0, "response")
    ('1 prompt', '0 responses')
    """
    return f"{count} {name}{'s' * (count != 1)}"


def setting(value: Any) -> str:
    """A JSON value: of a table its names and values, without those that are not set (None, NaN).

    >>> setting({"spec": {"vocab_width": 64, "kind": "slab"}, "stage": None, "eos": True, "keep": 1 / 3})
    'spec (vocab_width 64, kind slab), eos yes, keep 0.333333'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        # Names as they are: one may be that of a user's validation set.
        parts = [(name, inner, setting(inner)) for name, inner in value.items()]
        return ", ".join(
            f"{name} ({text})" if isinstance(inner, (dict, list)) else f"{name} {text}"
            for name, inner, text in parts
            if text
        )
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else str(value)


def _amount(value: float, units: Sequence[tuple[str, float]], least: float) -> str:
    """The value in the largest unit of which there are ``least``."""
    name, one = next((unit for unit in units if value >= least * unit[1]), units[-1])
    return f"{value / one:.3g} {name}"
