"""`cropi select --export`, `--push-to-hub`: which datasets are taken, what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support.commands import cropi, json_lines
from support.made_data import make_records, save_policy, write_lines

from cropi.data.readers import read
from cropi.ranking.scores import Scores
from cropi.ranking.table import write_scores
from cropi.store.rows import RowInfo


@pytest.mark.long
def test_select_exports_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", make_records(20))
    write_lines(tmp_path / "valid.jsonl", make_records(8, seed=1))
    run = [
        "run",
        "--model",
        tmp_path / "model",
        "--train",
        tmp_path / "train.jsonl",
        "--valid",
        tmp_path / "valid.jsonl",
    ]
    assert cropi(*run, "--out", tmp_path / "run", "--dim", 512, "--no-progress") == 0
    write_lines(tmp_path / "data.jsonl", [{"id": r["id"], "question": r["prompt"]} for r in make_records(20)])
    base = [
        "select",
        "--scores",
        tmp_path / "run/scores.parquet",
        "--out",
        tmp_path / "selected.jsonl",
        "--table",
        0,
    ]
    assert cropi(*base, "--export", tmp_path / "out.jsonl", "--dataset", tmp_path / "data.jsonl") == 0
    ids = [row["id"] for row in json_lines(tmp_path / "selected.jsonl")]
    assert [row["id"] for row in json_lines(tmp_path / "out.jsonl")] == ids and len(ids) == 2
    assert "export        2 prompts as jsonl" in capsys.readouterr().out
    named = {"out.parquet": "parquet", "out.txt": "ids", "out.json": "indices", "out.rows": "jsonl"}
    for name, form in named.items():
        rows = [] if form == "ids" else ["--dataset", tmp_path / "data.jsonl"]
        assert cropi(*base, "--export", tmp_path / name, *rows) == 0
        assert f"export        2 prompts as {form}: " in capsys.readouterr().out
    for words in (["--export", tmp_path / "x", "--format", "parquet"], ["--format", "ids"]):
        with pytest.raises(SystemExit):
            cropi(*base, *words)
    error = capsys.readouterr().err
    assert "--format parquet needs the prompts' rows" in error
    weights = ["--export", tmp_path / "x", "--format", "weights", "--dataset", tmp_path / "data.jsonl"]
    assert cropi(*base, *weights, "--method", "random") == 2
    assert "--format weights has chances, and this is a choice by random, which" in capsys.readouterr().err
    assert "what --export FILE holds is said by --format; give it too" in error


def scored(folder: Path, ids: Sequence[str]) -> list[Any]:
    """A command that chooses the last two of these prompts."""
    table = np.arange(float(len(ids)))[:, None]
    meta = {"metric": "cosine", "train": {"stage": "0", "model": {"weights": "aa"}}}
    rows, even = [RowInfo(name) for name in ids], np.full(len(ids), 2 / len(ids))
    write_scores(folder / "scores.parquet", Scores(rows, ["x"], table, meta, p_selected=even))
    files = ["--scores", folder / "scores.parquet", "--trajectories", folder / "train.jsonl"]
    return ["select", *files, "--out", folder / "selected.jsonl", "--count", 2, "--table", 0]


@pytest.mark.parametrize(
    "wanted", ("indices", "weights", "jsonl", pytest.param("push", marks=pytest.mark.long))
)
def test_a_dataset_of_other_prompts_is_refused_before_the_choice(
    wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    # It is there where something else has imported it.
    monkeypatch.delattr(huggingface_hub, "utils", raising=False)
    records = make_records(6)
    write_lines(tmp_path / "train.jsonl", records)
    write_lines(tmp_path / "data.jsonl", [{**record, "id": f"other {record['id']}"} for record in records])
    form = ["--export", tmp_path / "out", "--format", wanted]
    if wanted == "push":
        form = ["--push-to-hub", "a/b"]
    command = scored(tmp_path, [record["id"] for record in records])
    assert cropi(*command, *form, "--dataset", tmp_path / "data.jsonl") == 2
    assert "2 of 2 prompts have no row" in capsys.readouterr().err
    assert not (tmp_path / "selected.jsonl").exists()


def test_weights_of_another_choice_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were refused after the choice was written and said to be selected."""
    records = make_records(6)
    write_lines(tmp_path / "train.jsonl", records)
    command = scored(tmp_path, [record["id"] for record in records])
    form = ["--export", tmp_path / "out", "--format", "weights", "--dataset", tmp_path / "train.jsonl"]
    assert cropi(*command, *form, "--count", 3) == 2
    said = capsys.readouterr()
    assert "p_selected in the scores is of choices of 2 prompts, and this selection has 3" in said.err
    assert "selected" not in said.out and not (tmp_path / "selected.jsonl").exists()


@pytest.mark.parametrize("wanted", ("indices", "weights", "jsonl"))
def test_a_dataset_needs_the_chosen_prompts_alone(
    wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused where it lacked any of the pool's first 200."""
    records = make_records(6)
    write_lines(tmp_path / "train.jsonl", records)
    write_lines(tmp_path / "data.jsonl", records[3:])
    names = [record["id"] for record in records]
    form = ["--export", tmp_path / "out", "--format", wanted, "--dataset", tmp_path / "data.jsonl"]
    assert cropi(*scored(tmp_path, names), *form) == 0
    written = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    right = {"indices": [[2, 1]], "weights": [[1 / 3] * 3], "jsonl": [records[5], records[4]]}
    assert written == right[wanted]
    (tmp_path / "selected.jsonl").unlink()
    write_lines(tmp_path / "data.jsonl", records[:5])
    assert cropi(*scored(tmp_path, names), *form) == 2
    assert f"1 of 2 prompts have no row, for example '{names[5]}'" in capsys.readouterr().err
    assert not (tmp_path / "selected.jsonl").exists()


def test_ids_need_no_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", make_records(5))
    names = [record["id"] for record in make_records(6)]
    assert cropi(*scored(tmp_path, names), "--export", tmp_path / "out.txt") == 0
    assert (tmp_path / "out.txt").read_text().split() == [names[5], names[4]]


@pytest.mark.parametrize("words, said", [
    ("--out-trajectories t.jsonl", "1 selected prompts are not in train.jsonl, for example '5 a"),
    ("--export e.jsonl", "1 selected prompts are not in train.jsonl, for example '5 a"),
    ("--export e.txt", "format ids: the prompt id '5 a\\nb' is not one line"),
    ("--plot a.jpg", "plot: a.jpg should end in one of .png, .pdf, .svg"),
    # Taken without a word, though they had no effect.
    ("--export e --format ids --dataset no.jsonl", "format ids writes ids alone, and a dataset has rows; leave --da"),
    ("--push-to-hub a/b --format parquet", "--format is for --export FILE, and the hub gets rows; give that too"),
    ("--push-to-hub a/b --data-source c", "--data-source is for --export FILE, and the hub gets rows; give that"),
])  # fmt: skip
def test_all_files_of_a_choice_are_written_or_none(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids were written before an error in the second file."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "train.jsonl", make_records(5))
    command = scored(Path(), [*(record["id"] for record in make_records(5)), "5 a\nb"])
    there = set(tmp_path.iterdir())
    try:
        code = cropi(*command, *words.split())
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == there


@pytest.mark.long
def test_quiet_shows_no_bar_of_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "train.jsonl", make_records(6))
    command = scored(tmp_path, [record["id"] for record in make_records(6)])
    for words, shown in (([], True), (["-q"], False), ([], True)):
        assert cropi(*command, "--export", tmp_path / "out", "--format", "save_to_disk", *words) == 0
        assert bool(capsys.readouterr().err) is shown


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::cropi.data.readers.HashedIds")
@pytest.mark.parametrize("form", ("indices", "ids", "jsonl"))
def test_rows_that_are_found_by_their_content(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the export took rows that are no table, the push failed behind the choice."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("datasets.Dataset.push_to_hub", lambda *_, **__: None)
    records = [{key: value for key, value in record.items() if key != "id"} for record in make_records(6)]
    write_lines(tmp_path / "train.jsonl", records)
    command = scored(tmp_path, [group.id for group in read(tmp_path / "train.jsonl")])
    given = ["--export", tmp_path / "out", "--format", form, "--dataset", tmp_path / "data.jsonl"]
    write_lines(
        tmp_path / "data.jsonl", [records[0] | {"odd": 1}, *(row | {"odd": {"a": 1}} for row in records[1:])]
    )
    assert cropi(*command, *given, "--push-to-hub", "a/b") == 2
    assert "'odd' do not fit into a column of one type" in capsys.readouterr().err
    assert not (tmp_path / "selected.jsonl").exists()
    write_lines(tmp_path / "data.jsonl", records)
    assert cropi(*command, *given, "--push-to-hub", "a/b") == 0
    assert form != "indices" or json.loads((tmp_path / "out").read_text()) == [5, 4]
    # Hashes say of which rows they are; the records need not be there.
    at = command.index("--trajectories")
    (tmp_path / "out").unlink()
    if form == "ids":
        del given[-2:]
    assert cropi(*command[:at], *command[at + 2 :], *given) == 0
    assert form != "indices" or json.loads((tmp_path / "out").read_text()) == [5, 4]
