"""What the recorder writes can be read, whatever the dataset and the reward functions hold; what is checked first."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import logging
import math
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from support.commands import json_lines  # noqa: E402
from support.trl_runs import dataset, digits, recorded, staged  # noqa: E402

from cropi.data.readers import read  # noqa: E402
from cropi.data.records import parse_record  # noqa: E402
from cropi.data.scan import NothingToSelect, scan  # noqa: E402
from cropi.errors import CropiError  # noqa: E402
from cropi.trainers import values  # noqa: E402
from cropi.trainers.trl import Curriculum, Recording  # noqa: E402
from cropi.trainers.trl.records import (  # noqa: E402
    OURS,
    check_columns,
    checked_line,
    group_record,
    id_of,
)
from cropi.trainers.trl.rollout_log import RolloutLog  # noqa: E402
from cropi.trainers.values import plain_value, text_value  # noqa: E402

LOG = "cropi/rollouts/train-rank00000.jsonl"
NO_MODEL = {"model": "no/such-model"}  # reached only if everything before is let through


class Kind(enum.Enum):
    EASY = "easy"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None), (True, True), (7, 7), (0.5, 0.5), ("é", "é"), (10**40, 10**40),
        (math.nan, None), (math.inf, "inf"), (np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]), (torch.tensor([1.5]), [1.5]), (Kind.EASY, "easy"),
        (datetime.date(2024, 1, 2), "2024-01-02"), (datetime.datetime(2024, 1, 2, 3), "2024-01-02T03:00:00"),
        (decimal.Decimal("1.50"), "1.50"), (b"\xff", "/w=="), (uuid.UUID(int=5), str(uuid.UUID(int=5))),
        (Path("a/b"), "a/b"), ({1: (b"", {2})}, {"1": ["", [2]]}), ("a\ud800b", "a\ufffdb"),
    ],
    ids=repr,
)  # fmt: skip
def test_values_of_every_kind_become_json(value: Any, expected: Any) -> None:
    found = plain_value(value, "here")
    assert found == expected and type(found) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected
    as_text = text_value(value, "here")
    assert as_text is None if expected is None else isinstance(as_text, str)
    if isinstance(expected, str):
        assert as_text == expected
    elif expected is not None:
        assert json.loads(as_text or "") == expected


def test_values_of_too_many_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is a part, and so is everything in it, as often as it comes."""
    monkeypatch.setattr(values, "LARGEST", 100)
    assert plain_value([[0] * 49, [0] * 48], "here") == [[0] * 49, [0] * 48]
    with pytest.raises(CropiError, match="here: a value of more than 100 parts"):
        plain_value([[0] * 49] * 2, "here")


def test_an_object_without_a_form_in_json_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "a", "answer": object() if i == 3 else i} for i in range(8)]
    with pytest.raises(CropiError, match="train_dataset, row 3: a value of type object cannot be written"):
        recorded(tmp_path, train_dataset=rows, **NO_MODEL)
    with pytest.raises(CropiError, match="eval_dataset, row 3: a value of type object"):
        recorded(tmp_path, eval_dataset=rows, **NO_MODEL)
    # Where nothing is recorded, nothing has to be written.
    check_columns(rows, "train_dataset", Recording(columns=()))


@pytest.mark.parametrize("column", sorted(OURS))
def test_columns_that_a_record_sets_itself(tmp_path: Path, column: str) -> None:
    with pytest.raises(CropiError, match=f"columns names '{column}'"):
        recorded(tmp_path, Recording(columns=(column,)), **NO_MODEL)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="columns names 'difficulty', but train_dataset has only id, prompt"):
        recorded(tmp_path, Recording(columns=("task", "difficulty")), **NO_MODEL)
    # One that only the training prompts have is fine, and so are the defaults, which are taken where they are.
    rows = [{"id": "a", "prompt": "p", "difficulty": 3}]
    check_columns(rows, "train_dataset", Recording(columns=("difficulty",)))
    check_columns(
        [{"id": "a", "prompt": "p"}], "eval_dataset", Recording(columns=("difficulty",)), every=False
    )
    check_columns([{"id": "a", "prompt": "p"}], "train_dataset", Recording())


def test_a_value_that_no_reader_takes_is_found_in_a_late_row() -> None:
    rows = [{"id": str(i), "answer": 10**5000 if i == 9 else i} for i in range(10)]
    with pytest.raises(CropiError, match="train_dataset, row 9: its columns answer do not go into"):
        check_columns(rows, "train_dataset", Recording())


def test_ids_in_nested_columns_are_recorded(tmp_path: Path) -> None:
    assert id_of({"a.b": 1, "a": {"b": 2}}, "a.b") == "1" and id_of({"a": {"b": 2}}, "a.b") == "2"
    rows = dataset(20).map(lambda row: {"info": {"index": row["id"]}}).remove_columns("id")
    trainer = recorded(
        tmp_path, Recording(id_key="info.index"), train_dataset=rows, eval_dataset=None, max_steps=1,
        remove_unused_columns=True,
    )  # fmt: skip
    trainer.train()
    assert {r["id"] for r in json_lines(tmp_path / LOG)} <= {f"p0-{i:03d}" for i in range(20)}


COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "task is an integer": ({"task": 3}, {"task": "3"}),
    "task is a list": ({"task": ["a", "b"]}, {"task": '["a", "b"]'}),
    "answer is nested": ({"answer": {"x": [1, 2]}}, {"answer": {"x": [1, 2]}}),
    "answer is a date": ({"answer": datetime.datetime(2024, 1, 1)}, {"answer": "2024-01-01T00:00:00"}),
    "answer is bytes": ({"answer": b"\xff"}, {"answer": "/w=="}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_recorded_is_what_the_reader_finds(name: str, tmp_path: Path) -> None:
    given, expected = COLUMNS[name]
    trainer = recorded(tmp_path, max_steps=1, train_dataset=dataset(20, **given), eval_dataset=None)
    trainer.train()
    groups = list(read(tmp_path / LOG))
    assert len(groups) == 2
    for group in groups:
        assert {key: getattr(group, key) for key in expected} == expected


# A reward at every fourth place, which TRL lets through; what is left is the group without it.
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "without a reward"), (math.nan, "without a reward"), (-math.inf, "with an infinite reward"),
        (1e300, "with an infinite reward"), (1e35, "with a reward beyond 1e+30"),
    ],
    ids=repr,
)  # fmt: skip
def test_responses_with_rewards_that_cannot_be_used_are_left_out(
    bad: float | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[float | None] = []

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        values = [bad if k % 4 == 2 else value for k, value in enumerate(digits(completions))]
        given.extend(values)
        return values

    with caplog.at_level(logging.WARNING):
        recorded(tmp_path, reward_funcs=reward, max_steps=2).train()
    records = json_lines(tmp_path / LOG)
    assert len(records) == 4
    good = [value for k, value in enumerate(given) if k % 4 != 2]
    assert [value for record in records for value in record["rewards"]] == pytest.approx(good)
    for record in records:
        sizes = {len(record[key]) for key in ("responses", "response_ids", "logprobs", "truncated")}
        assert sizes == {3} == {len(record["rewards"])}
    assert not scan([tmp_path / LOG]).bad
    said = [r.getMessage() for r in caplog.records if "left out of the records" in r.getMessage()]
    assert len(said) == 1 and f"2 of 8 responses at step 0 are {words}" in said[0]


def test_a_function_without_a_finite_number_is_null_in_the_record(tmp_path: Path) -> None:
    def other(completions: list[str], **columns: Any) -> list[float]:
        return [-math.inf] * len(completions)

    trainer = recorded(tmp_path, reward_funcs=[digits, other], reward_weights=[1.0, 0.0], max_steps=1)
    trainer.train()
    text = (tmp_path / LOG).read_text()
    assert "Infinity" not in text and "NaN" not in text
    for record in json_lines(tmp_path / LOG):
        assert [entry["other"] for entry in record["rewards_by_function"]] == [None] * 4


@pytest.mark.long
def test_nothing_scored_is_nothing_to_select(tmp_path: Path) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[float | None]:
        return [None] * len(completions)

    from support.trl_runs import stored

    valid = stored(tmp_path / "valid.jsonl", seed=1, count=8)
    with pytest.raises(
        NothingToSelect, match="none of the 4 .*4 with fewer than two responses that a reward"
    ):
        options = {"valid": valid, "on_nothing": "error"}
        staged(tmp_path / "a", options, reward_funcs=nothing, eval_dataset=None).train()
    kept = staged(
        tmp_path / "b", {"valid": valid, "on_nothing": "keep"}, reward_funcs=nothing, eval_dataset=None
    )
    kept.train()
    assert kept.state.global_step == 6
    train = stored(tmp_path / "train.jsonl", seed=0, count=8)
    with pytest.raises(CropiError, match="nothing was recorded of eval_dataset: none of its 4 prompts"):
        staged(tmp_path / "c", {"train": train}, reward_funcs=nothing).train()


# ------------------------------------------------------------------------------------------ a single line
GOOD: dict[str, Any] = {
    "id": "a", "prompt_ids": [1], "response_ids": [[1], [2]], "rewards": [0.0, 1.0],
    "logprobs": [[-1.0], [-2.0]], "step": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": [[math.nan], [-1.0]]}, "not JSON compliant"),
        ({"logprobs": [[0.5], [-1.0]]}, r"logprobs\[0\]\[0\] must be a finite number <= 0"),
        ({"prompt_ids": []}, "prompt_ids must be a list of at least one token id"),
        ({"task": 3}, "'task' must be a string"),
        ({"answer": {1, 2}}, "set is not JSON serializable"),
        ({"prompt": "\ud800"}, "surrogates not allowed|half of a surrogate pair"),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error_when_it_is_written(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    log = RolloutLog(tmp_path, 0)
    log.append("train", [GOOD])
    with pytest.raises(CropiError, match=rf"prompt 'a' \(step 4\) make no record.*({words})"):
        log.append("train", [GOOD, GOOD | change])
    assert json_lines(tmp_path / "train-rank00000.jsonl") == [GOOD]  # not even the good one before it
    assert parse_record(checked_line(GOOD, "x"), "x").rewards == [0.0, 1.0]


def test_messages_about_huge_records_stay_short(tmp_path: Path) -> None:
    huge = GOOD | {"id": "x" * 100_000, "task": ["y" * 100_000]}
    with pytest.raises(CropiError) as caught:
        checked_line(huge, "here")
    assert len(str(caught.value)) < 2000


def test_reasons_are_counted() -> None:
    rows = [
        {"id": "a", "prompt_ids": [2], "response_ids": ids, "loss_mask": [1] * len(ids), "reward": reward}
        for ids, reward in (([1], 0.0), ([], 1.0), ([1], math.nan), ([1], math.inf), ([1], -2e30), ([1], 1.0))
    ]
    rows.append(rows[0] | {"loss_mask": [0]})
    left_out: Counter[str] = Counter()
    record = group_record(rows, {"step": 1}, left_out)
    assert record is not None and record["rewards"] == [0.0, 1.0] and record["step"] == 1
    assert left_out == {
        "empty": 1, "without a reward": 1, "with an infinite reward": 1, "with a reward beyond 1e+30": 1,
        "without a token that is scored": 1,
    }  # fmt: skip
    assert group_record(rows[:2], {}, left_out) is None


def test_responses_to_unlike_prompts_make_no_record() -> None:
    rows = [{"id": "a", "prompt_ids": ids, "response_ids": [1], "reward": 0.0} for ids in ([2], [2], [3])]
    with pytest.raises(CropiError, match="the prompt 'a' follow prompts of different tokens.*env_mask"):
        group_record(rows, {}, Counter())


# ------------------------------------------------------------------------------------ options, at construction
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage_steps": "2"}, "stage_steps must be an integer, got '2'; it is text"),
        ({"stage_steps": True}, "stage_steps must be an integer, got True"),
        ({"stage_steps": 2.0}, "stage_steps must be an integer, got 2.0"),
        ({"fraction": "1e-1"}, "fraction must be a finite number, got '1e-1'; it is text: .*1.0e-6 a number"),
        ({"fraction": math.nan}, "fraction must be a finite number, got nan"),
        ({"valid_sets": "math"}, r"valid_sets must be a list .* or None, got 'math'; for one, write \['math'\]"),
        ({"exclude": "*norm*"}, r"exclude must be a list .*; for one, write \['\*norm\*'\]"),
        ({"max_valid": 0}, "max_valid must be an integer of at least 1, got 0"),
        ({"max_valid": 2.5}, "max_valid must be an integer or None, got 2.5"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be an integer of at least 1"),
        ({"seed": "1"}, "seed must be an integer or None, got '1'"),
        ({"spec": {"dim": 4}}, "spec must be a SketchSpec, got"),
        ({"estimator": 3}, "estimator must be a string or an Estimator, got 3"),
        ({"keep_sketches": "yes"}, "keep_sketches must be True or False, got 'yes'"),
        ({"use_recorded": 1}, "use_recorded must be True or False or None, got 1"),
        ({"folder": 3}, "folder must be a string or a path or None, got 3"),
        ({"recording": True}, "recording must be a Recording or None, got True"),
        ({"metric": ["cosine"]}, "metric must be a string"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_of_another_type(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CropiError, match=words):
        Curriculum(**({"stage_steps": 2} | change))


@pytest.mark.parametrize("change", [{"columns": "task"}, {"logprobs": 1}, {"text": "no"}, {"id_key": 3}])
def test_recording_options_of_another_type(change: dict[str, Any]) -> None:
    with pytest.raises(CropiError, match=f"recording: {next(iter(change))} must be"):
        Recording(**change)


def test_numbers_of_numpy_are_stored_as_pythons() -> None:
    options = Curriculum(
        stage_steps=np.int64(3), fraction=np.float32(0.5), seed=np.int32(1), max_valid=np.uint8(2)
    )
    assert [type(getattr(options, name)) for name in ("stage_steps", "fraction", "seed", "max_valid")] == [
        int, float, int, int
    ]  # fmt: skip
    assert json.loads(json.dumps(options.settings()))["fraction"] == 0.5


def untapped(model: Any) -> Any:
    model.register_parameter("loose", torch.nn.Parameter(torch.zeros(3)))
    return model


@pytest.mark.parametrize(
    ("stages", "change", "words"),
    [
        ({"exclude": ["*nrom*"]}, None, r"policy cannot be sketched: .*'\*nrom\*' matches no"),
        ({}, untapped, "policy cannot be sketched: no tap sees"),
    ],
)
def test_a_policy_that_cannot_be_sketched_is_refused_before_training(
    stages: dict[str, Any], change: Callable[[Any], Any] | None, words: str, tmp_path: Path
) -> None:
    from support.made_data import make_model

    given = {"model": change(make_model())} if change else {}
    with pytest.raises(CropiError, match=f"(?s){words}"):
        staged(tmp_path, stages, **given)


def test_a_disk_without_room_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    # Stage 0 records 2 prompts in each of 2 generation batches: 4 sketches of 1024 float32 numbers.
    for free, fits in ((4 * 1024 * 4, True), (4 * 1024 * 4 - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            staged(tmp_path)
            continue
        with pytest.raises(CropiError, match="sketches of 4 prompts need .* GB at least"):
            staged(tmp_path)
        with pytest.raises(CropiError, match="sketches of 4 prompts need 4.92e-05 GB"):
            staged(tmp_path, {"keep_sketches": True})  # of three stages
