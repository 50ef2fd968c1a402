"""Trajectory files: what is read, and how every kind of bad input is named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_records, write_lines

from cropi.data.readers import read
from cropi.data.scan import LossyTokens, scan, warn_lossy
from cropi.errors import CropiError, RecordError
from cropi.gradient.behaviour import behaviour_source

GOOD: dict[str, Any] = {
    "id": "a", "prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0.0],
    "response_ids": [[4, 1], [5]], "logprobs": [[-0.1, -0.2], [-3.0]],
}  # fmt: skip


def test_released_layout_is_read_unchanged(tmp_path: Path) -> None:
    record = {"id": 7, "prompt": "1+1=", "answer": "2", "responses": ["2", "3"], "rewards": [1.0, 0.0]}
    (group,) = read(write_lines(tmp_path / "t.jsonl", [record]))
    assert (group.id, group.prompt, group.answer) == ("7", "1+1=", "2")
    assert group.responses == ["2", "3"] and group.rewards == [1.0, 0.0] and group.size == 2
    assert group.logprobs is None and group.temperature is None and group.set is None
    assert group.where == f"{tmp_path / 't.jsonl'}:1"


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_records_come_back(tmp_path: Path, name: str) -> None:
    records = [
        GOOD,
        {
            **GOOD,
            "id": "b",
            "set": "arith",
            "task": "sum",
            "level": 3,
            "temperature": 0.7,
            "truncated": [False, True],
        },
    ]
    plain = write_lines(tmp_path / "in.jsonl", records).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith(".gz") else plain)
    assert [group.to_record() for group in read(tmp_path / name)] == records


def test_byte_order_mark_blank_lines_and_missing_newline_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n" + json.dumps({**GOOD, "id": "b"}).encode()
    )
    assert [group.id for group in read(path)] == ["a", "b"]


BAD = {
    "not JSON": ('{"id": "x", ', "not a JSON object"),
    "not an object": ("[1, 2]", "a JSON object is expected, got list"),
    "no id": ({"id": None}, "the key 'id' is null"),
    "no rewards": ({"rewards": None}, "the key 'rewards' is null"),
    "no rewards, said": ({"rewards": None}, "score the responses and write one number for each as 'rewards'"),
    "no responses": ({"responses": None, "response_ids": None}, "the key 'responses' is null"),
    "no prompt": ({"prompt": None}, "the key 'prompt' is null (and 'prompt_ids' missing)"),
    "no prompt and ids": ({"prompt": None, "prompt_ids": None}, "'prompt' is null (and 'prompt_ids' too)"),
    "no rewards at all": ({"rewards": [], "responses": []}, "'rewards' must be a list"),
    "a reward too many": ({"rewards": [1, 0, 1]}, "'responses' must have one entry per reward (3), got 2"),
    "reward NaN": ({"rewards": [float("nan"), 0]}, "rewards[0] must be a finite number, got nan"),
    "reward infinite": ({"rewards": [0, float("inf")]}, "rewards[1] must be a finite number, got inf"),
    "reward huge": ({"rewards": [0, -1e300]}, "rewards[1] is -1e+300, beyond 1e+30, so that advantages would overflow"),
    "reward text": ({"rewards": ["1", 0]}, "rewards[0] must be a finite number, got '1'"),
    "empty response": ({"response_ids": None, "logprobs": None, "responses": ["2", ""]}, "responses[1] is empty"),
    "no token": ({"response_ids": [[4, 1], []]}, "response_ids[1] must be a list of at least one token id"),
    "negative token": ({"response_ids": [[4, -1], [5]]}, "response_ids[0][1] must be a token id"),
    "log-prob missing": ({"logprobs": [[-0.1], [-3.0]]}, "logprobs[0] must have one entry per token of"),
    "log-prob positive": ({"logprobs": [[-0.1, 0.5], [-3.0]]}, "logprobs[0][1] must be a finite number <= 0, got 0.5"),
    "log-prob NaN": ({"logprobs": [[-0.1, float("nan")], [-3.0]]}, "logprobs[0][1] must be a finite number <= 0"),
    "log-prob beyond floats": ({"logprobs": [[-0.1, -(10**400)], [-3.0]]}, "logprobs[0][1] must be a finite number"),
    "log-probs without ids": ({"response_ids": None}, "'logprobs' without 'response_ids'"),
    "temperature": ({"temperature": 0}, "'temperature' must be a positive number, got 0"),
    "truncated": ({"truncated": [1, 0]}, "'truncated' must be a list of true and false"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "message without role": ({"prompt": [{"content": "hi"}]}, "needs 'role' and 'content'"),
    "set": ({"set": 3}, "'set' must be a string, got 3"),
    "misnamed key": ({"responses": None, "response_ids": None, "replies": []}, "the record has 'id', 'prompt'"),
    "number beyond any float": ({"rewards": [10**400, 0]}, "rewards[0] must be a finite number, got 1000"),
    "number of 5000 digits": (f'{{"id": {"1" * 5000}}}', "not readable as JSON"),
    "brackets without end": ("[" * 100_000, "not readable as JSON"),
    "half a character": ({"prompt": "a \ud83d"}, "\\ud83d is half of a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_record_is_named_with_file_line_and_remedy(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    line = change if isinstance(change, str) else json.dumps(GOOD | {"id": "x"} | change)
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD | {'id': 'z'})}\n")
    with pytest.raises(RecordError) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:2") and message in str(caught.value)
    assert ";" in str(caught.value), "the remedy follows the problem"
    left_out: list[RecordError] = []
    assert [g.id for g in read(path, skip_bad=True).each(left_out.append)] == ["a", "z"]
    assert len(left_out) == 1 and message in str(left_out[0])


@pytest.mark.parametrize("key", ["prompt_ids", "response_ids"])
def test_the_largest_token_id_is_found_in_prompts_and_responses(tmp_path: Path, key: str) -> None:
    ids = {"prompt_ids": [3, 4], "response_ids": [[4, 1], [5]]}
    high = {"prompt_ids": [98, 4], "response_ids": [[4, 1], [98]]}[key]
    path = write_lines(tmp_path / "t.jsonl", [GOOD | ids, GOOD | ids | {"id": "b", key: high}])
    assert scan([path]).largest_id == (98, f"{path}:2 (prompt 'b')")


def test_duplicate_id_names_both_places_also_across_files(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", [GOOD])
    two = write_lines(tmp_path / "two.jsonl", [GOOD | {"id": "b"}, GOOD])
    with pytest.raises(RecordError, match="prompt id 'a' was used before") as caught:
        list(read([one, two]))
    assert f"{two}:2" in str(caught.value) and f"{one}:1" in str(caught.value)
    assert [group.id for group in read([one, two], skip_bad=True)] == ["a", "b"]
    # The first record of a run's log is its oldest: --skip-bad would keep that.
    log = write_lines(tmp_path / "log.jsonl", [GOOD | {"step": step} for step in (0, 1)])
    with pytest.raises(
        RecordError, match="keep the record of the newest step, as `cropi convert FOLDER"
    ) as caught:
        list(read(log))
    assert "skip" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="no such file"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(CropiError, match="is a folder; give trajectory files"):
        list(read(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CropiError, match="is a pipe or a device"):
        list(read(tmp_path / "pipe"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CropiError, match="holds no trajectory record"):
        list(read(tmp_path / "empty.jsonl"))
    whole = gzip.compress((json.dumps(GOOD) + "\n").encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CropiError, match="gzip stream is damaged after line"):
        list(read(tmp_path / "cut.jsonl.gz", skip_bad=True))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(RecordError, match="latin.jsonl:1: not UTF-8"):
        list(read(tmp_path / "latin.jsonl"))


def test_scan_counts_and_its_fingerprint_ignores_compression(tmp_path: Path) -> None:
    records = [
        GOOD,
        GOOD | {"id": "b", "rewards": [1, 1], "set": "v"},
        {"id": "c", "prompt": "p", "responses": ["x"], "rewards": [1], "set": "v"},
    ]
    found = scan([write_lines(tmp_path / "t.jsonl", records)])
    assert (found.prompts, found.responses, found.usable) == (3, 5, 1)
    assert found.without_gradient == {"equal rewards": 1, "one response": 1} and found.sets == {"v": 2}
    assert found.largest_id == (5, f"{tmp_path / 't.jsonl'}:1 (prompt 'a')")
    packed = gzip.compress((tmp_path / "t.jsonl").read_bytes())
    for name in ("t.jsonl.gz", "renamed.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert scan([tmp_path / name]).fingerprint == found.fingerprint
    changed = scan([write_lines(tmp_path / "u.jsonl", [GOOD | {"rewards": [0, 1]}, *records[1:]])])
    assert changed.fingerprint != found.fingerprint
    with pytest.warns(
        LossyTokens,
        match="^t.jsonl: 1 of 3 records have no response_ids.*; 1 of them do not say which.*--no-eos",
    ):
        warn_lossy(found, "t.jsonl")
    with pytest.warns(LossyTokens, match="to be exact$"):
        warn_lossy(found, "t.jsonl", eos=False)
    told = scan(
        [
            write_lines(
                tmp_path / "v.jsonl", [one | {"truncated": [True] * len(one["rewards"])} for one in records]
            )
        ]
    )
    with pytest.warns(LossyTokens, match="to be exact$"):
        warn_lossy(told, "t.jsonl")


def test_behaviour_source_is_decided_once_for_all_records(tmp_path: Path) -> None:
    without = make_records(3)
    some = scan([write_lines(tmp_path / "some.jsonl", [GOOD, *without])])
    every = scan([write_lines(tmp_path / "all.jsonl", [GOOD])])
    none = scan([write_lines(tmp_path / "none.jsonl", without)])
    assert (
        behaviour_source("auto", every, True) == "file" and behaviour_source("auto", none, True) == "current"
    )
    assert (
        behaviour_source("model", some, True) == "model"
        and behaviour_source("current", every, True) == "current"
    )
    assert behaviour_source("file", none, needed=False) == "current"
    for asked, found in (("auto", some), ("file", some), ("file", none)):
        with pytest.raises(CropiError, match="no 'logprobs' in this record") as caught:
            behaviour_source(asked, found, True)
        assert without[0]["id"] in str(caught.value)
