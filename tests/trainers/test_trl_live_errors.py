"""Live selection inside TRL: runs that go on from a checkpoint, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")

from datasets import concatenate_datasets
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.trl_runs import SPEC, dataset, digits, staged, stored

import cropi
from cropi.agreement import Alone
from cropi.errors import CropiError
from cropi.ranking.table import read_scores
from cropi.trainers.trl import Curriculum, Live
from cropi.trainers.trl.live import STATE, LiveRun
from cropi.trainers.trl.stages import Stages

LIVE = {"live": Live(dim=1024), "fraction": 0.5, "stage_steps": 2}


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return stored(tmp_path / "valid.jsonl", seed=1, count=4)


@pytest.mark.long
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, valid: Path) -> None:
    options, saved = LIVE | {"valid": valid}, {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = staged(tmp_path / "out", options, **saved)
    whole.train()
    again = staged(tmp_path / "out", options, **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True)
    )
    one, other = whole._cropi.live.selector, again._cropi.live.selector
    assert torch.equal(one._rows.values, other._rows.values) and one.step == other.step == 4
    (tmp_path / "out" / "checkpoint-3" / STATE).unlink()
    third = staged(tmp_path / "out", options, **saved)
    with pytest.raises(CropiError, match=f"holds no {STATE}"):
        third.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


@pytest.mark.long
def test_a_selector_of_another_model_is_refused(tmp_path: Path, valid: Path) -> None:
    options = LIVE | {"valid": valid}
    live = staged(tmp_path / "out", options)._cropi.live
    live.save(tmp_path)
    live.load(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    for changes, message in (
        (
            {"model": make_model(intermediate_size=48)},
            r"model: .*down_proj.weight has the shape \[32, 64\], and",
        ),
        ({"processing_class": tokenizer}, "tokenizer: its tokens are not those"),
    ):
        other = staged(tmp_path / "other", options, **changes)._cropi.live
        with pytest.raises(CropiError, match=f"the state's sketches are of another {message}"):
            other.load(tmp_path)


# -------------------------------------------------------------------------------------------------- bad input
def test_options_are_checked(valid: Path) -> None:
    for options, message in (
        ({"train": valid}, "train names files, but live"),
        ({"method": "max"}, "method is 'max', but live chooses by cropi.Selector"),
    ):
        with pytest.raises(CropiError, match=message):
            Curriculum(stage_steps=2, live=Live(), valid=valid, **options)
    for changes, message in (
        ({"refresh": 0}, "refresh"),
        ({"opposed": 2.0}, "from 0 to 1"),
        ({"dim": "a"}, "dim"),
    ):
        with pytest.raises(CropiError, match=message):
            Live(**changes)


def test_a_stage_that_holds_fewer_prompts_than_a_batch_is_an_error(tmp_path: Path, valid: Path) -> None:
    """When the trainer is built, and not by more prompts than were asked for."""
    for options, message in (
        ({"fraction": 0.05}, "stage 0 has 1 prompts, but one generation batch takes 2"),
        ({"fraction": 0.01}, "fraction 0.01 of a pool of 20 prompts chooses none"),
        ({"count": 21, "fraction": 0.1}, "count 21 is more than the 20 prompts of train_dataset"),
        ({"count": 4, "fraction": 0.3}, "fraction 0.3 is of no use here: it is for a choice without count"),
    ):
        with pytest.raises(CropiError, match=message):
            staged(tmp_path / "out", LIVE | {"valid": valid} | options)


@pytest.mark.long
def test_a_second_run_of_one_trainer_is_an_error(tmp_path: Path, valid: Path) -> None:
    """But for one that goes on."""
    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = staged(tmp_path / "out", LIVE | {"valid": valid}, **saved)
    trainer.train()
    with pytest.raises(CropiError, match=r"train\(\) was called on this trainer before"):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert trainer._cropi.live.selector.step == 2


def test_a_validation_set_whose_gradients_are_all_zero_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rewards differ, and no token of a response is trained on, say: the set had left the means without a word."""
    options = Curriculum(stage_steps=2, spec=SPEC, live=Live(dim=1024))
    run = LiveRun(make_model(), options, ["a", "b"], seed=0, tokenizer=make_tokenizer())
    rows = torch.ones(2, SPEC.dim, dtype=torch.float32, device="cpu")
    lost = [("y", "zero gradient")] * 2
    sketched = [
        (["x"], rows[:1], lost),
        (["x", "y"], rows, []),
        (["x"], rows[:1], lost),
        ([], rows[:0], lost),
    ]
    monkeypatch.setattr(cropi.pipeline, "sketch_validation", lambda *_, **__: sketched.pop(0))
    refresh = partial(run.refresh, run.sketcher.model, make_tokenizer(), None, 3, 0, Alone())
    with pytest.raises(
        CropiError, match=r"stage 3: no prompt of the validation set 'y' has a usable gradient \(2 with zero"
    ):
        refresh()
    for sets, said in ((2, ""), (1, "does not count until"), (1, "validation means before are kept")):
        caplog.clear()
        refresh(later=True)
        assert said in caplog.text and ("(2 with zero gradient)" in caplog.text) == bool(said)
        assert len(run.selector._valid) == sets


@pytest.mark.long
@pytest.mark.parametrize("live", [True, False], ids=["live", "scored"])
def test_a_training_goes_on_without_validation_sets_that_are_solved(
    live: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One set from the second stage on, all from the third: each was an error, which ended the training."""

    def rewards(completions: list[str], **columns: Any) -> list[float]:
        solved = {0: "", 1: "y"}.get(columns["trainer_state"].global_step, "xy")
        return [
            0.0 if name in solved else reward for reward, name in zip(digits(completions), columns["set"])
        ]

    held_out = concatenate_datasets([dataset(2, seed=1, set="x"), dataset(2, seed=2, set="y")])
    source = {"live": Live(dim=1024)} if live else {"train": stored(tmp_path / "t.jsonl", seed=0, count=8)}
    trainer = staged(
        tmp_path / "out", {"stage_steps": 1, "valid_sets": ["x", "y"], **source}, max_steps=3, reward_funcs=rewards,
        train_dataset=dataset(20, set="train"), eval_dataset=held_out, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=16,
    )  # fmt: skip
    trainer.train()
    words = "none of the 2 prompts of the validation set 'y' has a gradient (2 with equal rewards); the"
    assert f"stage 1: {words} set does not count until it has one again" in caplog.text
    kept = "validation means before are kept" if live else "prompts of the stage before are kept"
    assert f"stage 2: {words} {kept}" in caplog.text and trainer.state.global_step == 3
    notes = json_lines(tmp_path / "out" / "cropi" / "stages.jsonl")
    if live:
        assert len(trainer._cropi.live.selector._valid) == 1 and notes[2]["selected"] == 10
    else:
        assert [note.get("kept") for note in notes] == [None, None, True]
        assert read_scores(tmp_path / "out" / "cropi" / "stage-0001" / "scores.parquet").sets == ["x"]


def test_a_set_that_counts_against_prompts_may_be_solved_too(tmp_path: Path) -> None:
    """A choice without it, where ``minus`` named a set that was left out; and none by that set alone."""
    rewards = {"x": [1.0, 0.0, 0.0, 0.0], "y": [1.0] * 4}
    made = [record | {"rewards": rewards[record["set"]]} for record in make_records(4, sets=["x", "y"])]
    records = write_lines(tmp_path / "valid.jsonl", made)
    for minus, groups, left in (("y", ["x", "x"], None), ("x", None, "x")):
        options = Curriculum(stage_steps=1, spec=SPEC, minus=minus, minus_weight=0.5, valid_sets=["x", "y"])
        stages = SimpleNamespace(
            options=options, _chosen=[], live=None, seed=0, ranks=Alone(), _sources=lambda *_: [records]
        )
        valid, used = Stages._valid(stages, 1, tmp_path)  # type: ignore[arg-type]
        assert (None if valid is None else [group.set for group in valid]) == groups
        assert used.valid_sets == ["x"] and used.minus == left
