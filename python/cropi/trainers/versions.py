"""Which releases of a trainer an adapter works with: a range that was tried, and a way past it at one's own risk."""

from __future__ import annotations

import importlib.metadata
import os
import re

from cropi.errors import CropiError


def checked_version(
    package: str, oldest: str, newest: str, *, missing: str, remedy: str, allow_untested: bool = False
) -> str:
    """The installed version of ``package``.

    Args:
        package: its name; ``CROPI_<PACKAGE>_UNTESTED=1`` in the environment accepts any version.
        oldest, newest: the ends of the tested range; third numbers are free.
        missing: what to do where it is not installed.
        remedy: what to do where its version is another one.
        allow_untested: accept any version.

    Raises:
        ModuleNotFoundError: it is not installed.
        CropiError: its version is outside the range.
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
    if not minor(oldest) <= minor(installed) <= minor(newest):
        raise CropiError(
            f"{package} {installed} is installed; this adapter is tested with {oldest} to {newest}, and relies on "
            f"parts of it that any release may change: {remedy}, or, to try it all the same, set {override}=1"
        )
    return installed


def minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version, (-1, -1) where there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)
