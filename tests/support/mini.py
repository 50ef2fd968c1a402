"""The miniature RLVR experiment at the scale of the tests: its base policy, and what all arms of a seed share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rlvr_mini.config import SCALES
from benchmarks.rlvr_mini.data import SeedData, base_model, seed_data

NANO = SCALES["nano"]


class Killed(BaseException):
    """Where a run is stopped."""


def fresh(work: Path) -> tuple[Any, SeedData]:
    """The base policy and the first seed's data."""
    model = base_model(NANO, work)
    return model, seed_data(NANO, 0, model, work / "seed0")
