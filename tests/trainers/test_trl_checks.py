"""The checks of a curriculum in TRL are those of a job, and are switched off by the same names."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")
from support.made_data import make_records, write_lines
from support.trl_runs import stored

from cropi.data.scan import scan
from cropi.errors import CropiError
from cropi.trainers.trl import Curriculum, Recording
from cropi.trainers.trl.checks import check_arguments, with_template_values
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


def test_what_the_trainer_gives_to_its_template_files_get_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Options of the curriculum come first; tools of environments are not known of a file's prompts."""
    texts = scan(write_lines(tmp_path / "texts.jsonl", make_records(3)))
    scans = {"train": texts, "valid": scan(stored(tmp_path / "tokens.jsonl", seed=1, count=4))}

    def add(a: int) -> int:
        """Adds.

        Args:
            a: a number.
        """
        return a

    def values(kwargs: Any = None, known: Any = (), factories: Any = None, **options: Any) -> tuple[Any, Any]:
        args = SimpleNamespace(chat_template_kwargs=kwargs)
        trainer = SimpleNamespace(args=args, tools=list(known), environment_factories=factories)
        made = with_template_values(trainer, Curriculum(stage_steps=2, **options), scans)
        job = setup_of(made, 0, 0).job
        assert (job.tools, job.chat_template_kwargs) == (made.tools, made.chat_template_kwargs)
        return made.chat_template_kwargs, made.tools

    off, schema = {"enable_thinking": False}, {"type": "function", "function": {"name": "b"}}
    assert values() == (None, None)
    assert values(off) == (off, None) and values(off, chat_template_kwargs={}) == (None, None)
    _, [made, given] = values(off, [add, schema])
    assert made["function"]["name"] == "add" and given == schema
    assert values(off, [add], tools=[schema]) == (off, [schema])
    assert not caplog.records
    assert values(off, [add], {"e": object}) == (off, None)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["3 train prompts are text"]
    scans.pop("train")
    assert values(off, [print]) == (None, None)  # tokens need neither


def test_choices_that_cannot_be_made_are_errors_before_the_first_stage() -> None:
    """What is recorded in the first stage is chosen from after its training: here 4 prompts of the 8."""
    args = SimpleNamespace(
        max_steps=4,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        generation_batch_size=8,
        ignore_data_skip=False,
        per_device_eval_batch_size=8,
        world_size=1,
    )
    rows = [
        {"id": str(i), "prompt": "q", "task": task} for i, task in enumerate(["sums", 3, 3, 3, 3, 3, 3, 3])
    ]
    trainer = SimpleNamespace(
        args=args, num_iterations=1, num_generations=4, is_fsdp_enabled=False, is_deepspeed_enabled=False,
        train_dataset=rows, eval_dataset=rows, num_generations_eval=2,
    )  # fmt: skip
    for told, options in (
        ("quota: there is no task 'sum'; .*there are '3', 'sums'$", {"quota": ["sum=0.5"]}),
        (
            "but no prompt names its task; name the column",
            {"quota": ["sums=1"], "recording": Recording(columns=())},
        ),
        (
            "but no prompt names its task; name the column",
            {"per": "task", "recording": Recording(columns=())},
        ),
        ("add up to 1.2", {"quota": ["sums=0.6", "3=0.6"]}),
        ("is not NAME=NUMBER", {"quota": ["sums"]}),
        ("the groups get 5 prompts, but 4 are chosen", {"quota": ["sums=5"], "count": 4}),
        ("the groups get 4 prompts, but 3 are chosen", {"quota": ["3=4"], "fraction": 0.75}),
        ("'sums' is to give 2 prompts, but train_dataset has 1 of it; lower it", {"quota": ["sums=2"]}),
        (
            "'sums' is to give 2 prompts, but train_dataset has 1 of it",
            {"quota": ["sums=0.5"], "fraction": 1.0},
        ),
        ("'sums' is to give 2 prompts, but train_dataset has 1 of it", {"quota": ["sums=0.5"], "count": 4}),
        ("get 2 of 4 prompts and no other group is left", {"quota": ["sums=1", "3=1"], "count": 4}),
        ("count 4 is more than the 2 prompts that the quotas leave", {"quota": ["3=1"], "count": 4}),
        (None, {"quota": ["sums=0.5"], "fraction": 1.0, "pool": "usable"}),
        ("count 5 is more than the 4 prompts that the first stage records", {"count": 5}),
        (None, {"quota": ["sums=1", "3=0.75"], "count": 4}),
        (None, {"quota": ["3=3"], "fraction": 0.75}),
    ):
        raises = contextlib.nullcontext() if told is None else pytest.raises(CropiError, match=told)
        with raises:
            check_arguments(trainer, Curriculum(stage_steps=2, **options), 8)
