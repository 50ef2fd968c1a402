"""What pass rates say of scores: the measures on made tables, and the command on the experiment's smallest scale."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the experiment's policy is a transformers model")

from support.mini import NANO

from benchmarks import pass_rates
from benchmarks.pass_rates import MEASURES, measured
from benchmarks.rlvr_mini.data import base_model, save_torch
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.table import read_scores, write_scores
from cropi.store.rows import RowInfo


def rows_of(rates: np.ndarray) -> list[RowInfo]:
    return [RowInfo(f"p{i:03d}", pass_rate=rate, tokens=1) for i, rate in enumerate(rates)]


def test_measures_of_made_tables() -> None:
    """Scores that are the pass rates, or fall with the deviation, or have nothing to do with either."""
    rng = np.random.default_rng(0)
    rates = rng.permutation(np.arange(1, 400) / 400)
    rising = dict(zip(MEASURES, measured(rows_of(rates), rates[:, None], 2), strict=True))
    assert rising["p with score"] == rising["p with size"] == pytest.approx(1)
    assert rising["best in the first fifth by p"] == 1 and rising["by the deviation"] < 0.1
    assert rising["gain"] == rising["found with rates"] - rising["found without"] > 0.4
    falling = -np.sqrt(rates * (1 - rates))[:, None]
    even = dict(zip(MEASURES, measured(rows_of(rates), falling, 2), strict=True))
    assert even["deviation with score"] == pytest.approx(-1) and even["by the deviation"] == 0
    assert abs(even["p with score"]) < 0.02
    unrelated = dict(zip(MEASURES, measured(rows_of(rates), rng.standard_normal((399, 2)), 8), strict=True))
    # Rank correlations of 399 unrelated numbers have the standard error 1 / sqrt(398).
    assert abs(unrelated["p with score"]) < 4 / 398**0.5 and abs(unrelated["gain"]) < 0.15


def test_nothing_to_measure_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pass_rates.main(["--out", "rates.md"])
    assert "nothing to measure: give --tables FILE, --mini FOLDER or both" in capsys.readouterr().err


def test_command_on_a_table_and_on_the_experiment(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_rates, "HALVES", 3)
    table, out, folder = tmp_path / "scores.parquet", tmp_path / "rates.md", tmp_path / "nano"
    rates = np.arange(1, 61) / 61
    write_scores(table, Scores(rows_of(rates), ["made"], np.sin(40 * rates)[:, None], {}))
    options = [
        "--tables",
        str(table),
        "--mini",
        str(tmp_path),
        "--scale",
        "nano",
        "--draws",
        "1",
        "--out",
        str(out),
    ]
    with pytest.raises(CropiError, match="cropi_pool3/policy.pt is missing; run python -m"):
        pass_rates.main(options)
    shutil.copytree(work, folder, dirs_exist_ok=True)
    (folder / "seed0" / "cropi_pool3").mkdir(parents=True)
    save_torch(folder / "seed0" / "cropi_pool3" / "policy.pt", base_model(NANO, folder).state_dict())
    pass_rates.main(options)
    lines = out.read_text().splitlines()
    assert len(lines) == 4 + 3 and all(line.count("|") == len(MEASURES) + 3 for line in lines[2:])
    made = [
        read_scores(folder / "seed0" / f"scores-{name}.parquet").table for name in ("base", "cropi_pool3")
    ]
    np.testing.assert_array_equal(*made)  # the same weights
