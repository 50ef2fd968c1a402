"""Selections and score tables that are damaged, or of other hands: named, or read for what they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cropi.cli import main
from cropi.curriculum.state import FORMAT, State
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.selection_files import read_selection
from cropi.ranking.table import read_scores, write_scores
from cropi.report.html import _composition
from cropi.store.rows import RowInfo


def test_a_damaged_state_of_a_curriculum_is_named(tmp_path: Path) -> None:
    """A number that is another one would repeat a stage, or leave it out."""
    state = State(
        tmp_path / "state.json", {"format": FORMAT, "settings": {}, "done": [{"stage": 7}], "started": None}
    )
    state.write()
    text = state.path.read_text()
    state.path.write_text(text.replace('"stage": 7', '"stage": 6'))
    with pytest.raises(CropiError, match="state.json is damaged: its checksum does not match"):
        State.open(SimpleNamespace(out=tmp_path, settings=dict))  # type: ignore[arg-type]


def test_lines_of_other_hands_need_an_id_alone(tmp_path: Path) -> None:
    file = tmp_path / "selected.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b", "note": 1}\n')
    assert read_selection(file) == ["a", "b"]
    file.write_text("a\nb\n")
    assert read_selection(file) == ["a", "b"]
    file.write_text('{"id": "a", "check": "00000000"}\n')
    with pytest.raises(CropiError, match="line 1 of .* is damaged: its checksum does not match"):
        read_selection(file)


def test_a_prompt_that_stands_there_twice_before_a_line_without_an_id(tmp_path: Path) -> None:
    file = tmp_path / "selected.jsonl"
    file.write_text('{"id": "a"}\n{"id": "a"}\n{"rank": 2}\n[]\n{"id": "a"}\n')
    with pytest.raises(CropiError, match=r"selected.jsonl is not what .* writes: line 3.id is missing"):
        read_selection(file)


@pytest.mark.parametrize(
    "valid", [["x"], [{"path": 1}], [{"paths": ["x"]}], [{"path": "x", "paths": "y"}], 3]
)
def test_validation_stores_of_another_form_are_named(valid: object, tmp_path: Path) -> None:
    scores = Scores([RowInfo("a")], ["x"], np.ones((1, 1)), {"valid": valid})
    write_scores(tmp_path / "scores.parquet", scores)
    with pytest.raises(CropiError, match=r"scores.parquet is damaged: .*valid.*; make it again"):
        read_scores(tmp_path / "scores.parquet")


def test_an_uncertainty_without_one_of_the_sets_is_named(tmp_path: Path) -> None:
    one = {"name": "x", "prompts": 4, "stderr": 0.1, "stderr_at_cut": 0.1, "signal": 0.5}
    sure = {
        "sets": [one],
        "overlap": 0.5,
        "overlap_of_set": {"x": 0.5},
        "halves": 0.5,
        "draws": 9,
        "fraction": 0.5,
    }
    made = Scores([RowInfo("a")], ["x", "y"], np.ones((1, 2)), {"uncertainty": sure}, np.ones((1, 2)))
    write_scores(tmp_path / "scores.parquet", made)
    with pytest.raises(CropiError, match="its uncertainty leaves out the set 'y'"):
        read_scores(tmp_path / "scores.parquet")


def test_pass_rates_beyond_all_sense_are_shown() -> None:
    rows = [RowInfo(f"p{i}", pass_rate=rate) for i, rate in enumerate((1e308, -1e308, 0.3, 1.0))]
    tables = _composition(Scores(rows, ["x"], np.ones((4, 1)), {}), np.arange(4), np.arange(1))
    told = repr(next(table for table in tables if "pass rate" in repr(table)))
    assert "0.25 to 0.50" in told and "0.75 to 1.00" in told


def test_info_of_a_table_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scores.parquet"
    write_scores(file, Scores([RowInfo("a", "failed", "NaN")], ["x\x1b"], np.full((1, 1), np.nan), {}))
    assert main(["info", str(file)]) == 0
    told = capsys.readouterr().out
    assert "0 of 1 prompts have scores" in told and "lowest nan" in told and "\x1b" not in told
