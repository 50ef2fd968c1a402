"""What this release has been tried with, and clear words where verl is missing or of another kind."""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cropi.errors import CropiError

TESTED = ("0.7.1", "0.9.1")


class UntestedVersion(UserWarning):
    """This verl is newer than the newest that the adapter was tried with."""


def verl_version() -> tuple[int, ...]:
    """The installed verl's version.

    Raises:
        ModuleNotFoundError: verl is not installed.
    """
    try:
        text = version("verl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the package 'verl' is needed here: install it as its documentation says (tried: {' and '.join(TESTED)})",
            name="verl",
        ) from None
    found = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    newest = tuple(int(part) for part in TESTED[-1].split("."))
    if found[:2] > newest[:2]:
        warnings.warn(
            f"verl {text} is newer than {TESTED[-1]}, the newest that this adapter was tried with; if it fails, use "
            "per-stage datasets (cropi curriculum), which depend on verl's command line only",
            UntestedVersion,
            stacklevel=2,
        )
    return found


def need(module: str, name: str, what: str, instead: str) -> Any:
    """A class of verl.

    Args:
        module, name: where it is.
        what: what it is for.
        instead: what to use with a verl that has no such class.

    Raises:
        ModuleNotFoundError: verl is not installed.
        CropiError: this verl has no such class.
    """
    found = verl_version()
    try:
        return getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("verl"):
            raise  # one of verl's own dependencies
        raise CropiError(
            f"{what}: verl {'.'.join(map(str, found))} has no {module}.{name}; {instead}"
        ) from error
