"""Whose line a warning names."""

from __future__ import annotations

import sys

_NOT_THE_USERS = ("cropi_kernels", "cropi", "contextlib", "torch")


def level_of_caller() -> int:
    """``stacklevel``, for the function that asks, of the first frame outside of these packages and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return level
