"""The file of scores: everything comes back, and every byte counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stores import on_disk
from test_uncertainty import two_stores

import cropi
from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.pipeline import Setup, conclude, score
from cropi.ranking.resampling import with_uncertainty
from cropi.ranking.saving import own_rows
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.ranking.table import read_scores, write_scores
from cropi.ranking.uncertainty import Uncertainty, sets_of
from cropi.store.store import SketchStore


@pytest.fixture
def stores(tmp_path: Path) -> tuple[SketchStore, SketchStore]:
    return two_stores(tmp_path, 30, 6, 6)


@pytest.fixture
def scores(stores: tuple[SketchStore, SketchStore]) -> Scores:
    train, valid = stores
    return score(train, [valid], Influence(draws=20), Selecting(fraction=0.2))


def test_a_table_comes_back_whole(scores: Scores, tmp_path: Path) -> None:
    chosen = select(scores, Selecting(fraction=0.2))
    write_scores(tmp_path / "s.parquet", scores, chosen)
    back = read_scores(tmp_path / "s.parquet")
    assert back.rows == [replace(row, row=None) for row in scores.rows], "a place in a shard is the store's"
    assert (back.sets, back.meta) == (
        scores.sets,
        json.loads(json.dumps(scores.meta | {"selection": chosen.settings})),
    )
    for name in ("table", "stderr", "p_selected"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scores, name))
    sure = Uncertainty.of(back)
    assert sure is not None and sure.draws == 20 and str(sure) == str(Uncertainty.of(scores))
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(tmp_path / "s.parquet")
    assert table[table["selected"]].sort_values("rank")["id"].tolist() == chosen.ids
    assert table["rank"].isna().sum() == 1 and table.loc[table["id"] == "t005", "p_selected"].isna().all()
    assert list(scores.to_pandas().columns)[-3:] == ["stderr[x]", "stderr[y]", "p_selected"]


@pytest.mark.long
def test_every_byte_of_a_table_counts(scores: Scores, tmp_path: Path) -> None:
    """Each edit of one byte is an error, or the same table: no flip selects other prompts."""
    file = tmp_path / "s.parquet"
    write_scores(file, scores)
    whole, before = file.read_bytes(), read_scores(file)
    found = 0
    rng = np.random.default_rng(0)
    places = np.unique(
        np.concatenate([rng.integers(0, len(whole), 1500), np.arange(len(whole) - 600, len(whole))])
    )
    for place in places.tolist():
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :]
        )
        try:
            back = read_scores(file)
        except CropiError:
            found += 1
            continue
        assert back.rows == before.rows and back.meta == before.meta and back.sets == before.sets, place
        np.testing.assert_array_equal(back.table, before.table)
    assert found > len(places) / 2, found


def test_what_is_not_resampled_says_why(stores: tuple[SketchStore, SketchStore], scores: Scores) -> None:
    train, valid = stores
    plain = score(train, [valid], Influence(draws=0))
    assert plain.stderr is None and Uncertainty.of(plain) is None
    assert plain.meta["uncertainty_missing"] == "resampling was switched off (draws)"
    np.testing.assert_array_equal(plain.table, scores.table)
    few = with_uncertainty(plain, train, [valid], Influence(), Selecting(fraction=0.01))
    assert few.meta["uncertainty_missing"] == (
        "fraction 0.01 of a pool of 30 prompts chooses none; give a fraction of at least 0.034, a count, or more "
        "prompts"
    )


@pytest.mark.parametrize("prompts", [6, 9])
def test_a_pool_of_fewer_than_ten_has_standard_errors(prompts: int, tmp_path: Path) -> None:
    """Of a tenth of them, which is none, nothing could be resampled, and `cropi influence` has no other fraction."""
    train, valid = two_stores(tmp_path, prompts, 6, 6)
    made, one = (score(train, [valid], Influence(draws=20), given) for given in (None, Selecting(count=1)))
    assert made.stderr is not None and np.isfinite(made.stderr[made.usable]).all()
    np.testing.assert_array_equal(made.stderr, one.stderr)
    np.testing.assert_array_equal(made.p_selected, one.p_selected)
    assert np.nansum(made.p_selected) == pytest.approx(1.0)
    by_calls = cropi.influence(train, valid, draws=20)
    np.testing.assert_array_equal(by_calls.stderr, made.stderr)
    assert len(select(by_calls, fraction=1.0, confidence=0.9)) == made.usable.sum()
    # A method alone says nothing of how many; a fraction that chooses none says so.
    by_method = cropi.influence(train, valid, draws=20, method="rrf")
    np.testing.assert_array_equal(by_method.p_selected, made.p_selected)
    none = cropi.influence(train, valid, draws=20, fraction=0.1)
    assert none.stderr is None and "fraction 0.1 of a pool" in none.meta["uncertainty_missing"]


def test_of_a_baseline_nothing_is_drawn(stores: tuple[SketchStore, SketchStore], tmp_path: Path) -> None:
    """Its table held the chances of a choice by rrf, which `weights` gave out as those of its own choice."""
    made = dict(zip(("train", "valid"), stores, strict=True))
    by_rank, chosen = (
        conclude(
            made, Setup(influence=Influence(draws=20), selecting=Selecting(method=method)), tmp_path / method
        )
        for method in ("rrf", "random")
    )
    back = read_scores(tmp_path / "random" / "scores.parquet")
    assert back.p_selected is None and back.meta["uncertainty"].keys() == {"sets"}
    np.testing.assert_array_equal(back.stderr, by_rank.scores.stderr)
    for mine, other in zip(sets_of(back), sets_of(by_rank.scores), strict=True):
        assert mine.signal == other.signal and mine.stderr == other.stderr == mine.stderr_at_cut
    assert len(back.select(method="random", min_score=-1.0, confidence=0.9)) == 3  # standard errors are there
    words = "a choice by random, which looks at no score"
    for given in (chosen, by_rank.scores.select(method="random")):
        assert "p_selected" not in own_rows(given)[0]
        with pytest.raises(CropiError, match=f"weights: this is {words}.*: take the chosen prompts"):
            _ = given.weights
    with pytest.raises(
        CropiError,
        match=f"p_selected: the scores have none .the scores were made for {words}.*a method that is no",
    ):
        back.select(method="p_selected")
    with pytest.raises(CropiError, match="changes it.; score again by a method that is no baseline, or take"):
        _ = back.select(0.2).weights
    with pytest.raises(
        CropiError, match="draw p_selected is for methods that rank by scores, and method is random"
    ):
        Selecting(method="random", draw="p_selected")


def test_draws_choose_as_many_as_the_choice(stores: tuple[SketchStore, SketchStore]) -> None:
    """Of a trainer's batch, which is more than the fraction, the draws chose the fraction, or none."""
    made = dict(zip(("train", "valid"), stores, strict=True))
    for fraction in (0.01, 0.1):
        setup = Setup(influence=Influence(draws=20), selecting=Selecting(fraction=fraction), least=5)
        chosen = conclude(made, setup, None)
        assert len(chosen) == 5 and sum(chosen.weights.values()) == pytest.approx(5)


def test_more_pairs_than_fit_into_memory_are_not_resampled(
    stores: tuple[SketchStore, SketchStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are kept of the validation prompts with one another, too: 100,000 of them would take 80 GB."""
    train, valid = stores
    n, v = len(train), sum(row.row is not None for row in valid.rows())
    monkeypatch.setattr("cropi.ranking.resampling.MOST_PAIRS", n * v - 1)
    many = score(train, [valid], Influence(draws=2))
    assert many.meta["uncertainty_missing"].startswith(
        f"{n} x {v} pairs are more than are resampled; --max-valid"
    )
    assert score(train, [valid], Influence(draws=2, max_valid=2)).stderr is not None
    some = on_disk(train.path.parent / "few", torch.ones(2, train.dim), "t", ["train"] * 2)
    monkeypatch.setattr("cropi.ranking.resampling.MOST_PAIRS", v * v - 1)
    few = score(some, [valid], Influence(draws=2), Selecting(fraction=0.5))
    assert few.meta["uncertainty_missing"].startswith(f"{v} x {v} pairs of validation prompts are more than")
    monkeypatch.setattr("cropi.ranking.resampling.MOST_PAIRS", v * v)
    assert score(some, [valid], Influence(draws=2), Selecting(fraction=0.5)).stderr is not None


def test_at_most_so_many_validation_prompts_count_in_the_resampling_too(
    stores: tuple[SketchStore, SketchStore],
) -> None:
    train, valid = stores
    made = score(train, [valid], Influence(max_valid=3, draws=10), Selecting(fraction=0.2))
    sure = Uncertainty.of(made)
    assert sure is not None and [one.prompts for one in sure.sets] == [3, 3]
    np.testing.assert_array_equal(np.isfinite(sure.table), np.isfinite(made.table))


def test_a_small_file_that_names_many_rows_is_refused(
    scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal values take next to no bytes in a file, and eight each in memory."""
    parquet = pytest.importorskip("pyarrow.parquet")
    write_scores(tmp_path / "s.parquet", scores)
    table = parquet.read_table(tmp_path / "s.parquet")
    many = table.take([0] * 30_000).replace_schema_metadata({"cropi": "{}"})
    parquet.write_table(many, tmp_path / "m.parquet")
    monkeypatch.setattr("cropi.ranking.table.LARGEST", 1 << 20)
    assert 8 * many.num_rows * many.num_columns > 4 * (tmp_path / "m.parquet").stat().st_size
    with pytest.raises(
        CropiError, match=r"m.parquet is not a score table .*30000 rows would take 0.00\d+ GB"
    ):
        read_scores(tmp_path / "m.parquet")
    read_scores(tmp_path / "s.parquet")


def test_what_is_not_asked_for_is_not_read(scores: Scores, tmp_path: Path) -> None:
    """The rest is None, so that nobody takes a default for what the file says."""
    write_scores(tmp_path / "s.parquet", scores)
    some = read_scores(tmp_path / "s.parquet", only=("pass_rate", "file"), errors=False)
    np.testing.assert_array_equal(some.table, scores.table)
    assert some.ids == scores.ids and some.stderr is None and some.p_selected is not None
    for row, want in zip(some.rows, scores.rows, strict=True):
        assert (row.pass_rate, row.extra) == (
            want.pass_rate,
            {k: v for k, v in want.extra.items() if k == "file"},
        )
        assert row.norm is None and row.task is None and row.status is None
    assert select(some, Selecting(fraction=0.2)).ids == select(scores, Selecting(fraction=0.2)).ids


def test_nulls_and_other_kinds_of_numbers_of_other_writers_are_read(scores: Scores, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_scores(tmp_path / "s.parquet", scores)
    table = parquet.read_table(tmp_path / "s.parquet")
    narrow = pyarrow.array([None, *scores.table[1:, 0]], pyarrow.float32())
    table = table.set_column(table.column_names.index("score[x]"), "score[x]", narrow)
    parquet.write_table(table.replace_schema_metadata({"cropi": "{}"}), tmp_path / "o.parquet")
    want = np.array([np.nan, *scores.table[1:, 0].astype(np.float32)])
    np.testing.assert_array_equal(read_scores(tmp_path / "o.parquet").table[:, 0], want)


LIGHT = """
import sys
from cropi.cli import main
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 0, line
heavy = {"torch", "transformers", "pandas", "scipy.stats"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.long
def test_selecting_and_reporting_import_no_torch(scores: Scores, tmp_path: Path) -> None:
    """Its import alone takes more memory than the scores of a million prompts."""
    named = replace(scores, rows=[replace(row, task="t") for row in scores.rows])
    write_scores(tmp_path / "scores.parquet", named)
    start = f"select --scores {tmp_path}/scores.parquet --out {tmp_path}/selected.jsonl --fraction 0.2"
    lines = [
        f"{start} --confidence 0.9", f"{start} --method p_selected --per task", f"info {tmp_path}/scores.parquet",
        f"{start} --export {tmp_path}/ids.txt --format ids", f"report {tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input="\n".join(lines), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_values_that_no_prompt_has_are_refused(scores: Scores, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_scores(tmp_path / "s.parquet", scores)
    table = parquet.read_table(tmp_path / "s.parquet")
    for column, first, words in (
        ("status", "scored", "a value of the column status is 'scored', not one of failed, ok, skipped"),
        ("status", None, "a value of the column status is missing"),
        ("pass_rate", None, "a value of the column pass_rate is missing"),
        ("id", scores.ids[1], f"the prompt '{scores.ids[1]}' is there 2 times"),
    ):
        values = [first, *table.column(column).to_pylist()[1:]]
        place, kind = table.column_names.index(column), table.schema.field(column).type
        changed = table.set_column(place, column, pyarrow.array(values, kind))
        parquet.write_table(changed, tmp_path / "t.parquet")
        with pytest.raises(CropiError, match=words):
            read_scores(tmp_path / "t.parquet")


def test_a_count_beyond_64_bits_is_damage(scores: Scores, tmp_path: Path) -> None:
    """It overflowed where it was used."""
    scores.meta["uncertainty"]["sets"][0]["prompts"] = 10**400
    write_scores(tmp_path / "s.parquet", scores)
    with pytest.raises(CropiError, match="is damaged: uncertainty"):
        read_scores(tmp_path / "s.parquet")
