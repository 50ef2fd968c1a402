"""Which releases of a trainer an adapter works with: a range that was tried, and what happens outside of it."""

from __future__ import annotations

import importlib.metadata
import os
import re

from cropi.errors import CropiError, warn


class UntestedVersion(UserWarning):
    """A trainer is newer than what an adapter was tried with."""


def checked_version(
    package: str, oldest: str, newest: str, *, missing: str, remedy: str, allow_untested: bool = False
) -> str:
    """The installed version of ``package``.

    A version older than those that were tried raises an error. A newer one gives a warning: what the adapter relies on
    is checked by name when a trainer is built, and most releases change none of it.

    Args:
        package: its name; ``CROPI_<PACKAGE>_UNTESTED=1`` in the environment accepts any version.
        oldest, newest: the ends of the tested range; third numbers are free.
        missing: what to do where it is not installed.
        remedy: what to do where its version is another one.
        allow_untested: accept any version silently.

    Raises:
        ModuleNotFoundError: it is not installed.
        CropiError: its version is below the range.
    """
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the package {package!r} is needed here: {missing}", name=package
        ) from None
    override = f"CROPI_{package.upper()}_UNTESTED"
    if allow_untested or os.environ.get(override, "") not in ("", "0"):
        return installed
    problem = (
        f"{package} {installed} is installed; this adapter is tested with {oldest} to {newest}, and relies on "
        "parts of it that any release may change"
    )
    if minor(installed) < minor(oldest):
        raise CropiError(f"{problem}: {remedy}, or, to try it all the same, set {override}=1")
    if minor(installed) > minor(newest):
        warn(
            f"{problem}. What it relies on is checked by name; should something fail: {remedy}. {override}=1 turns "
            "this warning off", UntestedVersion,
        )  # fmt: skip
    return installed


def minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version, (-1, -1) where it has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)
