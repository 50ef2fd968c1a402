"""What this release has been tried with, and clear words where verl is missing or of another kind."""

from __future__ import annotations

from typing import Any

from cropi.trainers.hooks import base_class
from cropi.trainers.versions import checked_version, minor

TESTED = ("0.7.1", "0.9.1")


def verl_version() -> tuple[int, int]:
    """The installed verl's version, its first two numbers.

    Raises:
        ModuleNotFoundError: verl is not installed.
        CropiError: it is older than the tested range.
    """
    oldest, newest = TESTED
    return minor(
        checked_version(
            "verl", oldest, newest,
            missing=f"install it as its documentation says (tried: {oldest} and {newest})",
            remedy=f"install verl {oldest} or {newest}, or use per-stage datasets (`cropi curriculum`), which depend "
            "on verl's command line only",
        )
    )  # fmt: skip


def need(module: str, name: str, what: str, instead: str) -> Any:
    """A class of verl.

    Args:
        module, name: where it is.
        what: what it is for.
        instead: what to use with a verl that has no such class.

    Raises:
        ModuleNotFoundError: verl is not installed.
        CropiError: this verl is older than the tested range, or has no such class.
    """
    installed = ".".join(map(str, verl_version()))
    return base_class(what, module, name, {}, f"verl {installed} is installed: {instead}")
