"""The committed example data keeps the promises of examples/README.md. No model is loaded."""

from __future__ import annotations

import gzip
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cropi.data.records import parse_record

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
VOCABULARY, EOS, ROLLOUTS, MAX_NEW_TOKENS = 49152, 2, 8, 24
Record = dict[str, Any]


def read(name: str) -> list[Record]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def train() -> list[Record]:
    return read("train")


@pytest.fixture(scope="module")
def valid() -> list[Record]:
    return read("valid")


def mixed(record: Record) -> bool:
    return len(set(record["rewards"])) > 1


def test_every_line_is_a_valid_record(train: list[Record], valid: list[Record]) -> None:
    for record in train + valid:
        group = parse_record(json.dumps(record), record["id"])
        assert group.size == ROLLOUTS and group.temperature == 1.0 and group.policy


def test_train_has_mixed_groups_and_a_few_equal_ones(train: list[Record]) -> None:
    count = sum(map(mixed, train))
    assert count >= 160
    assert len(train) - count == 16
    # Both kinds of equal rewards: nothing right and everything right.
    assert {record["rewards"][0] for record in train if not mixed(record)} == {0.0, 1.0}


def test_three_validation_sets_of_sixteen_mixed_groups(valid: list[Record], train: list[Record]) -> None:
    assert sorted(Counter(record["set"] for record in valid).values()) == [16, 16, 16]
    assert all(map(mixed, valid))
    assert all(record["set"] == record["task"] for record in valid)
    assert "set" not in set().union(*train)
    covered, tasks = {record["task"] for record in valid}, {record["task"] for record in train}
    assert covered < tasks and len(tasks - covered) >= 3


def test_ids_and_prompts_are_unique_over_both_files(train: list[Record], valid: list[Record]) -> None:
    records = train + valid
    assert len({record["id"] for record in records}) == len(records)
    assert len({json.dumps(record["prompt"]) for record in records}) == len(records)


def test_tokens_and_logprobs_fit_together(train: list[Record], valid: list[Record]) -> None:
    for record in train + valid:
        assert all(0 <= token < VOCABULARY for token in record["prompt_ids"])
        for ids, logprobs, truncated in zip(record["response_ids"], record["logprobs"], record["truncated"]):
            assert all(0 <= token < VOCABULARY for token in ids)
            assert len(logprobs) == len(ids) and 1 <= len(ids) <= MAX_NEW_TOKENS
            assert all(-40 < logprob <= 0 for logprob in logprobs)
            # A response that ended by itself keeps its EOS, and only there.
            assert ids[:-1].count(EOS) == 0 and (ids[-1] == EOS) == (not truncated)
            assert not truncated or len(ids) == MAX_NEW_TOKENS


def test_rewards_are_zero_or_one_and_differ_between_responses_that_differ(train: list[Record]) -> None:
    for record in train:
        assert set(record["rewards"]) <= {0.0, 1.0}
        by_text: dict[str, set[float]] = {}
        for text, reward in zip(record["responses"], record["rewards"]):
            by_text.setdefault(text, set()).add(reward)
        assert all(len(rewards) == 1 for rewards in by_text.values()), record["id"]


def test_groups_are_short_and_files_small(train: list[Record], valid: list[Record]) -> None:
    tokens = [len(r["prompt_ids"]) + sum(map(len, r["response_ids"])) for r in train + valid]
    assert sum(tokens) / len(tokens) <= 170
    assert sum(path.stat().st_size for path in DATA.glob("*.jsonl.gz")) < 2_000_000


def test_files_carry_no_time_stamp() -> None:
    for path in DATA.glob("*.jsonl.gz"):
        assert path.read_bytes()[4:8] == bytes(4), f"{path.name}: write it with mtime=0"


@pytest.mark.long
def test_raw_rollouts_whose_last_line_was_cut_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    read = importlib.import_module("make_rollouts")._read_raw
    raw = tmp_path / "raw.jsonl"
    assert read(raw, 0, "m") == {}
    header = raw.read_text()
    raw.write_text(header + '{"id": "a"}\n{"id": "b", "resp')
    assert read(raw, 0, "m") == {"a": {"id": "a"}} and raw.read_text() == header + '{"id": "a"}\n'
    raw.write_text(header[:9])
    assert read(raw, 0, "m") == {} and raw.read_text() == header
    for other in ("my notes", "my notes\nwithout an end"):
        raw.write_text(other)
        with pytest.raises(SystemExit, match="was made with other settings"):
            read(raw, 0, "m")
        assert raw.read_text() == other, "a file of the user's"
