"""Standard output and error that are closed, full or have lost their reader: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import fill

from cropi.ranking.table import read_scores

pytestmark = pytest.mark.long

WAYS = {
    "output closed": ">&-",
    "error closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "output full": "> /dev/full",
    "error full": "2> /dev/full",
    "no reader": "| true",
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_lost_output_ends_no_work(tmp_path: Path) -> None:
    """A store of another estimator warns on standard error, the scores are told on standard output."""
    for name in ("a", "v"):
        fill(tmp_path / name, name, 20)
    command = f"{sys.executable} -m cropi influence --train {tmp_path}/a --valid {tmp_path}/v --draws 0 --out"
    tasks = {}
    for number, (way, how) in enumerate(WAYS.items()):
        line = f"set -o pipefail; {command} {tmp_path}/{number}.parquet {how}"
        tasks[way] = subprocess.Popen(
            ["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    for number, (way, task) in enumerate(tasks.items()):
        _, error = task.communicate()
        lost = "error" not in way
        assert task.returncode == (1 if lost else 0), (way, error)
        assert "Traceback" not in error and "Exception ignored" not in error, (way, error)
        assert len(read_scores(tmp_path / f"{number}.parquet")) == 20, way
