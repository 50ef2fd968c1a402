"""Every operation on files of every place fails once: words, nothing lost, no half file, and the work goes on.

A sample of them; ``CROPI_FAULTS=0.1`` tries that share of the operations, in the places that take longer too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.failing_files import PRELOADED, SHARE, check_places

pytestmark = pytest.mark.long

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


@PRELOADED
@pytest.mark.parametrize("places", [QUICK, *([LONG] if SHARE != "0" else [])], ids=lambda places: places[0])
def test_files_that_cannot_be_written(tmp_path: Path, places: list[str]) -> None:
    check_places("faults.py", tmp_path, places)
