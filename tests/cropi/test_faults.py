"""Every operation on files of every place fails once: words, nothing lost, no half file, and the work goes on.

A sample of them; ``CROPI_FAULTS=0.1`` tries that share of the operations, in the places that take longer too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SHARE = os.environ.get("CROPI_FAULTS", "0")
QUICK = [
    "store",
    "merge",
    "compact",
    "influence",
    "select",
    "export",
    "export parquet",
    "convert",
    "rollout log",
]
LONG = ["sketch", "curriculum", "rollout", "report", "select exports", "select plot", "select saved"]


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(os.environ.get("CXX", "c++")),
    reason="a library stands before the C library, by LD_PRELOAD",
)
@pytest.mark.parametrize("places", [QUICK, *([LONG] if SHARE != "0" else [])], ids=lambda places: places[0])
def test_files_that_cannot_be_written(tmp_path: Path, places: list[str]) -> None:
    """In a process of its own, with one thread: it forks, and begins anew with the library."""
    harness = Path(__file__).parents[1] / "support" / "faults.py"
    words = [sys.executable, str(harness), str(tmp_path), SHARE, *places]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(", 0 wrong") == len(places)
