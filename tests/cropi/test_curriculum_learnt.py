"""Whether a stage learnt anything, as the report of a curriculum says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.made_curriculum import config, curriculum, make_folder, report

from cropi.curriculum.data import source_of
from cropi.curriculum.learnt import nothing_learnt, read_training
from cropi.curriculum.state import State
from cropi.sealed import sealed
from cropi.trainers.trl.in_process import training_summary


def entry(step: int, reward: float | None, equal: float | None = 0.0) -> dict[str, float | int | None]:
    return {"step": step, "reward": reward, "frac_reward_zero_std": equal, "loss": 0.1}


def test_the_first_and_the_last_quarter_of_what_was_logged() -> None:
    logged = [entry(i, i / 10, 1 - i / 10) for i in range(1, 9)] + [{"train_runtime": 3.0}, entry(9, None)]
    found = training_summary(logged)
    assert found is not None and found["steps"] == [1, 8]
    assert found["reward"] == pytest.approx([0.15, 0.75]) and found["equal_rewards"] == pytest.approx(
        [0.85, 0.25]
    )
    assert training_summary([]) is None and training_summary([entry(1, float("nan"))]) is None
    assert training_summary([entry(4, 0.5, None)]) == {
        "steps": [4, 4], "reward": [0.5, 0.5], "equal_rewards": [None, None]
    }  # fmt: skip


def row(stage: int, weights: str, reward: list[float], equal: list[float]) -> dict[str, object]:
    return {
        "stage": stage,
        "weights": weights,
        "training": {"steps": [1, 9], "reward": reward, "equal_rewards": equal},
    }


def test_what_is_said_of_stages_that_learnt_nothing() -> None:
    assert nothing_learnt([row(0, "a", [0.1, 0.2], [0.5, 0.4]), row(1, "b", [0.2, 0.3], [0.5, 0.96])]) == []
    said = nothing_learnt([row(0, "a", [0.2, 0.2], [0.0, 0.0]), row(1, "a", [0.2, 0.3], [0.97, 1.0])])
    assert [text.split(":")[0] for text in said] == ["Stage 0", "Stage 0", "Stage 1"]
    assert (
        "weight by weight" in said[0]
        and "did not rise: 0.2 before, 0.2 after" in said[1]
        and "97%" in said[2]
    )
    assert nothing_learnt([{"stage": 0}]) == []


def test_what_a_trainer_left_that_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.symlink_to(path)
    with pytest.warns(UserWarning) as told:
        assert read_training(tmp_path) == {}
    said = "is left out of the report: it cannot be read: too many levels of symbolic links"
    assert [str(one.message) for one in told] == [f"{path} {said}"]


def test_every_changed_bit_of_the_summary_is_found_or_harmless(tmp_path: Path) -> None:
    summary = {"steps": [1, 9], "reward": [0.25, 0.5], "equal_rewards": [0.5, None]}
    path, whole = tmp_path / "training.json", (json.dumps(sealed(summary)) + "\n").encode()
    path.write_bytes(whole)
    assert read_training(tmp_path) == {"training": summary}
    found = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read = read_training(tmp_path)
        held = read.get("training", {})  # a checksum under another name is left in it
        assert {key: held.get(key) for key in summary} == (dict.fromkeys(summary) if told else summary), bit
        found += len(told)
    assert found > 7.5 * len(whole)
    path.write_text(json.dumps(summary))
    assert read_training(tmp_path) == {"training": summary}, "another trainer writes no checksum"


@pytest.mark.long
def test_a_trainer_that_trains_nothing_is_named_in_the_report(tmp_path: Path) -> None:
    made = make_folder(tmp_path)
    assert curriculum(config(made, tmp_path / "run", trainer="cp {model}/* {out} # {selected}")) == 0
    text = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "**Warning.** Stage 0: the policy is the same before and after training" in text
    assert "training" not in report(tmp_path / "run")[0] and read_training(tmp_path) == {}


@pytest.mark.long
def test_the_reward_of_trls_training_is_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    made = make_folder(tmp_path)
    args = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "logging_steps": 1,
        "max_completion_length": 4,
    }
    trl = {"reward": f"{__file__}:constant", "args": args}
    assert curriculum(config(made, tmp_path / "run", trainer="trl", trl=trl, stages=1)) == 0
    (found,) = report(tmp_path / "run")
    assert found["training"] == {"steps": [1, 4], "reward": [1.0, 1.0], "equal_rewards": [1.0, 1.0]}
    text = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "1 to 1 | 100% to 100%" in text and "equal rewards for 100% of the prompts" in text


def constant(completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


def test_a_budget_counts_a_training_that_nothing_cut_short(tmp_path: Path) -> None:
    """Of one that was taken up again, the seconds are those of what was left: a later stage would score too few."""
    done = [
        {"stage": stage, "step": "train", "seconds": seconds, "attempts": attempts}
        for stage, seconds, attempts in ((0, 90.0, 2), (1, 600.0, 1), (2, 30.0, 3))
    ]
    state = State(tmp_path / "state.json", {"done": done})
    assert [state.seconds("train", stage) for stage in range(4)] == [0.0, 90.0, 600.0, 600.0]


def test_a_stage_that_goes_on_works_on_no_records_that_it_collected_itself(tmp_path: Path) -> None:
    """Its scores are of the records before; those are for the stages after it."""
    plan = SimpleNamespace(train=["given"], valid=["asked"], behaviour_model=None, model="m")
    steps: list[tuple[int, str, dict[str, Any]]] = [
        (0, "rollouts", {"train": ["rolled"], "maker": "m"}), (0, "collect", {"train": ["first"]}),
        (1, "collect", {}), (2, "collect", {"train": ["third"]}),
    ]  # fmt: skip
    done = [{"stage": stage, "step": step, **made} for stage, step, made in steps]
    state = State(tmp_path / "state.json", {"done": done})
    found = [source_of(plan, state, stage).train for stage in range(4)]  # type: ignore[arg-type]
    assert found == [["rolled"], ["first"], ["first"], ["third"]]


def test_a_models_checkpoint_is_the_one_that_a_step_used_last(tmp_path: Path) -> None:
    """After --accept-changes there are two of one model: to compare with the first would refuse the run for good."""
    done = [
        {"stage": 0, "step": "sketch", "checkpoints": {"m": "old", "n": "kept"}},
        {"stage": 0, "step": "select"},
        {"stage": 0, "step": "train", "checkpoints": {"m": "new"}},
    ]
    state = State(tmp_path / "state.json", {"done": done})
    assert [state.checkpoint(model) for model in ("m", "n", "o")] == ["new", "kept", None]
