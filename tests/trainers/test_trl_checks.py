"""The checks of a curriculum in TRL are those of a job, and are switched off by the same names."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
from cropi.errors import CropiError
from cropi.trainers.trl import Curriculum
from cropi.trainers.trl.scoring import setup_of


@pytest.mark.parametrize("stage", [0, 2])
def test_checks_are_switched_off_by_name(stage: int) -> None:
    job = setup_of(Curriculum(stage_steps=2), stage, 0).job
    assert (job.verify, job.zero_check, job.behaviour_check) == (True, True, "warn" if stage else "error")
    options = Curriculum(stage_steps=2, verify=False, zero_check=False, behaviour_check="off")
    job = setup_of(options, stage, 0).job
    assert (job.verify, job.zero_check, job.behaviour_check) == (False, False, "off")
    # A run of the first release, which had no such options, can be resumed without them.
    assert "zero_check" not in str(Curriculum(stage_steps=2).settings())
    assert options.settings() != Curriculum(stage_steps=2).settings()
    with pytest.raises(CropiError, match="verify must be True or False, got 'no'"):
        Curriculum(stage_steps=2, verify="no")  # type: ignore[arg-type]
