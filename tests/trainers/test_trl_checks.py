"""The checks of a curriculum in TRL are those of a job, and are switched off by the same names."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
from support.made_data import make_records, write_lines
from support.trl_runs import stored

from cropi.data.scan import scan
from cropi.errors import CropiError
from cropi.trainers.trl import Curriculum
from cropi.trainers.trl.checks import warn_of_templates
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


def test_what_the_trainer_gives_to_its_template_is_said_to_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of files whose prompts are text: tokens, and a trainer without such settings, need no warning."""
    texts = scan(write_lines(tmp_path / "texts.jsonl", make_records(3)))
    scans = {"train": texts, "valid": scan(stored(tmp_path / "tokens.jsonl", seed=1, count=4))}
    for kwargs, tools, words in (
        ({"enable_thinking": False}, [], "args.chat_template_kwargs"),
        (None, [print], "tools"),
        ({"a": 1}, [print], "args.chat_template_kwargs and tools"),
        (None, [], None),
        ({}, None, None),
    ):
        caplog.clear()
        trainer = SimpleNamespace(args=SimpleNamespace(chat_template_kwargs=kwargs), tools=tools)
        with caplog.at_level(logging.WARNING):
            warn_of_templates(trainer, scans)
        said = [record.getMessage() for record in caplog.records]
        begin = "train: 3 prompts are text, to which the chat template is applied without the trainer's"
        assert [text.split(": give each")[0] for text in said] == (
            [] if words is None else [f"{begin} {words}"]
        )
