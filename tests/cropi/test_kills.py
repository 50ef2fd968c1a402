"""Every place that writes, killed at random instants: nothing lost, nothing twice, the same bits.

``CROPI_KILLS=500`` kills so often in every place, at other instants with another ``CROPI_SEED``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

KILLS, SEED = os.environ.get("CROPI_KILLS", "2"), os.environ.get("CROPI_SEED", "0")
QUICK = ["store", "merge", "compact", "influence", "select", "export"]


@pytest.mark.parametrize(
    "places", [QUICK, pytest.param(["sketch", "curriculum"], marks=pytest.mark.slow)], ids=str
)
def test_killed_anywhere(tmp_path: Path, places: list[str]) -> None:
    """In a process of its own, with one thread: it forks."""
    harness = Path(__file__).parents[1] / "support" / "kills.py"
    words = [sys.executable, str(harness), str(tmp_path), KILLS, SEED, *places]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("nothing lost") == len(places)
