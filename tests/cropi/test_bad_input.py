"""Bad input by its kind: each is one clear error with file, row and column, and ``--skip-bad`` counts it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.made_data import make_model, make_tokenizer, write_lines
from support.oracle import stored_logprobs

import cropi
from cropi.cli import main
from cropi.data import forms
from cropi.data.readers import read
from cropi.errors import CropiError, RecordError
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.options import Prompting
from cropi.rollouts.prompts import read_prompts

IDS = [[5, 6], [7]]


def record(i: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": f"p{i}", "prompt": f"q{i}", "responses": ["a", "b"], "rewards": [1.0, 0.0], **more}


def table(path: Path, columns: dict[str, Any]) -> Path:
    given = {
        "id": ["a", "b"],
        "prompt": ["q", "r"],
        "responses": [["a", "b"]] * 2,
        "rewards": [[1.0, 0.0]] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(given | columns), path)
    return path


# Values of a second row that no record has, by column, and what is said.
TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "rewards as text": ({"rewards": [["1", "0"]] * 2}, "row 0 (prompt 'a'): rewards[0] must be a finite number"),
    "rewards as one text": ({"rewards": ["[1, 0]"] * 2}, "row 0 (prompt 'a'): 'rewards' must be a list"),
    "ids that are not integers": ({"id": [1.5, 2.5]}, "row 0: 'id' must be a string or an integer, got 1.5"),
    "empty ids": ({"id": ["", " "]}, "row 0: 'id' is '', which is empty; give every prompt an id"),
    "prompts of numbers": ({"prompt": [3, 4]}, "row 0 (prompt 'a'): 'prompt' must be a string or a list of messages"),
    "tokens as bytes": ({"response_ids": [[b"ab", b"c"]] * 2}, "row 0 (prompt 'a'): response_ids[0] must be a list"),
    "tokens as text": ({"prompt_ids": [["5"]] * 2}, "row 0 (prompt 'a'): prompt_ids[0] must be a token id"),
    "a mask as text": (
        {"response_ids": [IDS] * 2, "loss_mask": [[["1", "1"], ["1"]]] * 2}, "loss_mask[0][0] must be 0 or 1"
    ),
    "a map of responses": (
        {"responses": pyarrow.array([[("a", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64()))},
        "'responses' must have one entry per reward (2), got 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TYPES))
def test_columns_of_a_wrong_type(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, words = TYPES[name]
    path = table(tmp_path / "t.parquet", columns)
    assert main(["info", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"cropi info: error: {path}, row 0" in error and words in error and error.count("\n") == 1
    write_lines(tmp_path / "good.jsonl", [record(i) for i in range(3)])
    rows = [record(3) | {key: values[0]} for key, values in columns.items() if key == "id"]
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    for bad in (lines, rows) if rows else ():
        with pytest.raises(RecordError, match=re.escape(words.removeprefix("row 0: "))):
            list(read(bad))
    groups = read([path, tmp_path / "good.jsonl"], skip_bad=True)
    assert [group.id for group in groups] == ["p0", "p1", "p2"] and len(groups.bad) == 2


def test_text_of_a_table_that_is_not_utf8_costs_its_row_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offsets, data = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3))), b"q\xff\xfe"
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(data)])
    for columns in ({"prompt": bad}, {"topic": bad}):
        path = table(tmp_path / "t.parquet", columns)
        assert main(["info", str(path)]) == 2
        told = f"{path}, row 1: the text in the column {next(iter(columns))!r} is not UTF-8 (byte 0)"
        assert told in capsys.readouterr().err
        assert main(["info", str(path), "--skip-bad"]) == 0
        out = capsys.readouterr().out
        assert "1 prompt, 2 responses" in out and f"bad record    {told}" in out
        prompts, errors = read_prompts(
            path, Tokenize(make_tokenizer(), 100, eos=False), Prompting(skip_bad=True)
        )
        assert [prompt.id for prompt in prompts] == ["a"] and str(errors[0]).startswith(told)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_parquet_file_that_was_cut_is_no_shorter_file(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.parquet", {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for more in ([], ["--skip-bad"]):
        assert main(["info", str(path), *more]) == 2
        assert "the parquet file is damaged or was cut after row 0" in capsys.readouterr().err


def test_files_of_several_schemas_and_rows_of_several_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What each file holds is found out for it; within a file, rows of another form are named."""
    response = {"id": "x", "prompt": "q", "response": "a", "reward": 1.0}
    one = write_lines(tmp_path / "a.jsonl", [record(0)])
    two = write_lines(tmp_path / "b.jsonl", [response, response | {"response": "b", "reward": 0.0}])
    three = table(tmp_path / "c.parquet", {})
    assert [(group.id, group.size) for group in read([one, two, three])] == [
        ("p0", 2),
        ("x", 2),
        ("a", 2),
        ("b", 2),
    ]
    mixed = write_lines(tmp_path / "m.jsonl", [record(0), response, record(2)])
    assert main(["info", str(mixed)]) == 2
    assert "m.jsonl:2: the key 'rewards' is missing" in capsys.readouterr().err
    groups = read(mixed, skip_bad=True)
    assert [group.id for group in groups] == ["p0", "p2"] and len(groups.bad) == 1
    mixed = write_lines(tmp_path / "m.jsonl", [response, record(0)])  # each row says itself what it is
    assert [(group.id, group.rewards) for group in read(mixed)] == [("x", [1.0]), ("p0", [1.0, 0.0])]
    dump = {"input": "q", "output": "a", "score": 1.0, "step": 1}
    mixed = write_lines(tmp_path / "m.jsonl", [record(0), dump])
    assert main(["info", str(mixed)]) == 2
    assert "m.jsonl:2: the key 'id' is missing" in capsys.readouterr().err


TOP = {
    "tables by token": [[{"5": -1.0, "9": -2.0}, {"6": -0.5}], [{"7": -1.0}]],
    "lists": [[[-1.0, -2.0], [-0.5, -3.0]], [[-1.0, -2.0]]],
}


@pytest.mark.parametrize("name", list(TOP))
def test_log_probs_of_the_likeliest_tokens_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        CropiError, match=r"logprobs\[0\]\[0\] must be a finite number.*the sampled token alone.*convert"
    ):
        list(read(write_lines(tmp_path / "t.jsonl", [record(response_ids=IDS, logprobs=TOP[name])])))


@pytest.mark.long
def test_log_probs_in_base_2_or_10_end_the_job_before_a_store_is_made(tmp_path: Path) -> None:
    """What they would do without a word: every ratio a power of the right one."""
    from cropi.gradient.behaviour_check import BehaviourMismatch

    model, tokenizer = make_model(), make_tokenizer()
    ids = [[20 + k, 30, 40, 50 + k, 60, 1] for k in range(4)]
    given = [
        {"id": str(n), "prompt_ids": [5 + n, 6], "response_ids": ids, "rewards": [1, 0, 1, 0]}
        for n in range(6)
    ]
    own = [stored_logprobs(model, one) for one in given]

    def records(scale: float) -> list[dict[str, Any]]:
        return [
            one | {"logprobs": [[p * scale for p in part] for part in parts]}
            for one, parts in zip(given, own)
        ]

    cropi.sketch(model, records(1.0), tokenizer, dim=512, progress=False)
    for scale in (1.442695, 0.4342945):  # log2(e), log10(e)
        with pytest.raises((CropiError, BehaviourMismatch), match="base"):
            cropi.sketch(model, records(scale), tokenizer, out=tmp_path / "store", dim=512, progress=False)
        assert not (tmp_path / "store").exists()


def test_prompts_whose_hashes_collide_are_not_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 bits: one pair in 100,000 prompts with a chance of 3e-10; it must show all the same."""
    for module in ("cropi.data.forms", "cropi.data.readers"):
        monkeypatch.setattr(f"{module}.content_id", lambda row: "text-0000")
    rows = [
        {"prompt": p, "response": r, "reward": n}
        for n, (p, r) in enumerate([("q", "a"), ("q", "b"), ("z", "c")])
    ]
    groups = read(write_lines(tmp_path / "rows.jsonl", rows), skip_bad=True)
    assert list(groups) == [] and "has another 'prompt'" in str(groups.bad[0])
    records = [{k: v for k, v in record(i).items() if k != "id"} for i in range(2)]
    path = write_lines(tmp_path / "records.jsonl", records)
    assert main(["info", str(path)]) == 2
    assert "the prompt id 'text-0000' was used before" in capsys.readouterr().err
    monkeypatch.setattr("cropi.trainers.dumps.rows.hashed", lambda text: "text-0000")
    dump = [{"input": p, "output": "a", "reward": n} for n, p in enumerate("qqz")]
    path = write_lines(tmp_path / "dump.jsonl", dump)
    assert main(["info", str(path), "--source", "openrlhf"]) == 2
    assert "another prompt at" in capsys.readouterr().err
    assert forms.group_key({"id": "a"}) == "id a"


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    for key in ("prompt", "responses", "note"):
        value = json.dumps(["\ud800", "b"] if key == "responses" else "\ud800")
        good = {k: v for k, v in record().items() if k != key}
        path.write_text(json.dumps(good)[:-1] + f', "{key}": {value}}}\n' + json.dumps(record(1)) + "\n")
        assert main(["info", str(path)]) == 2
        assert "t.jsonl:1: \\ud800 is half of a surrogate pair" in capsys.readouterr().err
        assert main(["info", str(path), "--skip-bad"]) == 0
        assert "1 prompt" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_a_file_whose_name_is_not_utf_8_is_sketched_in_memory(tmp_path: Path) -> None:
    """Its rows could not name it. A folder cannot note it: that was a UnicodeEncodeError once the model was loaded."""
    path = write_lines(tmp_path / os.fsdecode(b"t\xff.jsonl"), [record()])
    options: dict[str, Any] = {"tokenizer": make_tokenizer(), "dim": 64, "progress": False}
    (row,) = cropi.sketch(make_model(), path, **options).rows()
    assert row.extra["file"] == rf"{tmp_path}/t\udcff.jsonl"
    with pytest.raises(CropiError, match=r"t\\udcff.jsonl' is not UTF-8, .*; rename the file"):
        cropi.sketch(make_model(), path, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
