"""What is synced to the disk, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files and folders that are synced from now on, in order; Linux names them by their descriptors."""
    found: list[Path] = []
    sync = os.fsync

    def record(file: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        sync(file)

    monkeypatch.setattr(os, "fsync", record)
    return found
