"""Starts the harnesses that stand before the C library, by LD_PRELOAD: of failing disks and of power cuts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARE = os.environ.get("CROPI_FAULTS", "0")
PRELOADED = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(os.environ.get("CXX", "c++")),
    reason="a library stands before the C library, by LD_PRELOAD",
)


def check_places(harness: str, folder: Path, places: list[str]) -> None:
    """In a process of its own, with one thread: it forks, and begins anew with the library."""
    words = [sys.executable, str(Path(__file__).with_name(harness)), str(folder), SHARE, *places]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(", 0 wrong") == len(places)
