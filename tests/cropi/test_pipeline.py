"""The one pipeline: what it reads, hashes and writes, in memory, in a folder and shared by ranks."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.rank_threads import Threads, on_ranks

import cropi
import cropi.model.policy
from cropi import pipeline
from cropi.cli import main
from cropi.data.fast import RecordReader
from cropi.data.scan import NothingToSelect
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting, SelectionOptions, Sketching
from cropi.pipeline import Setup, check, choose
from cropi.ranking.selection import Selection, select
from cropi.sketching.interrupt import Interrupted

T = TypeVar("T")
pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
TRAIN, VALID = make_records(12), make_records(8, seed=1, sets=["x", "y"])
SETUP = Setup.of(SelectionOptions(sketching=Sketching(dim=1024), selecting=Selecting(fraction=0.25)))


def policy() -> Policy:
    return Policy(make_model(), make_tokenizer())


def quiet(*arguments: Any, **more: Any) -> Selection:
    return choose(*arguments, progress=False, **more)


# --------------------------------------------------------------------------------------- names of validation sets
def test_keys_and_records_that_name_different_sets() -> None:
    """A key that the user gave is the name; it neither wins over a record's own nor loses to it without a word."""
    unnamed, x, y = make_records(8, seed=1), VALID[0::2], VALID[1::2]
    chosen = quiet(policy(), TRAIN, {"x": x, "z": unnamed}, SETUP)
    assert chosen.scores is not None and chosen.scores.sets == ["x", "z"]
    for valid, message in (
        ({"math": x}, "valid has the key 'math', but 4 of the 4 records under it say that their set is 'x'"),
        ({"x": x[1:], "y": [*y, x[0]]}, "the key 'y', but 1 of the 5 records .* their set is 'x'"),
    ):
        with pytest.raises(CropiError, match=message):
            quiet(policy(), TRAIN, valid, SETUP)
        with pytest.raises(CropiError, match=message):
            cropi.score(make_model(), TRAIN, valid, tokenizer=make_tokenizer(), dim=1024, progress=False)
    assert quiet(policy(), TRAIN, VALID, SETUP).scores.sets == ["x", "y"]  # type: ignore[union-attr]
    # Files of the command line give their names to records that have none.
    assert [part.set for part in check(policy(), TRAIN, {"file": x}, SETUP).valid] == ["file"]


# ------------------------------------------------------------------------------------------------ reading
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often every record was parsed, by ``file:line``, and how often a model was hashed."""
    calls: Counter[str] = Counter()
    parse, fingerprint = RecordReader.__call__, cropi.model.policy.model_fingerprint

    def reading(self: RecordReader, line: bytes, where: str) -> Any:
        calls[where] += 1
        return parse(self, line, where)

    def hashing(*arguments: Any, **more: Any) -> Any:
        calls["model"] += 1
        return fingerprint(*arguments, **more)

    monkeypatch.setattr(RecordReader, "__call__", reading)
    monkeypatch.setattr(cropi.model.policy, "model_fingerprint", hashing)
    return calls


@pytest.mark.long
def test_a_run_parses_every_record_twice_and_hashes_the_weights_once(
    tmp_path: Path, counted: Counter[str]
) -> None:
    """Once to check it and once to sketch it; shown texts and chosen records are read from their places."""
    save_policy(tmp_path / "model")
    train = write_lines(tmp_path / "train.jsonl", make_records(40))
    valid = [write_lines(tmp_path / f"v{i}.jsonl", make_records(6, seed=i + 1)) for i in range(3)]
    words = [
        "run", "--model", str(tmp_path / "model"), "--train", str(train), "--valid", *map(str, valid), "--out",
        str(tmp_path / "out"), "--dim", "1024", "--no-progress", "--table", "3", "--no-report",
    ]  # fmt: skip
    assert main(words) == 0
    assert counted.pop("model") == 1
    chosen_or_shown = 4 + 2 * 3
    assert len(counted) == 40 + 18 and min(counted.values()) == 2
    more = {where: number for where, number in counted.items() if number > 2}
    assert all(where.startswith(str(train)) for where in more)
    assert sum(number - 2 for number in more.values()) <= chosen_or_shown


# ------------------------------------------------------------------------------------------------ choosing
@pytest.mark.long
def test_memory_and_folder_choose_alike(tmp_path: Path) -> None:
    said: list[str] = []
    memory = quiet(policy(), TRAIN, VALID, SETUP, say=said.append)
    folder = quiet(policy(), TRAIN, VALID, SETUP, tmp_path / "out")
    assert memory.ids == folder.ids and len(memory) == 3
    np.testing.assert_array_equal(memory.scores.table, folder.scores.table)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sketches",
        "scores.parquet",
        "selected.jsonl",
    }
    assert said[0] == "== valid" and said[2] == "== train" and "sketched" in said[1]


def test_what_is_checked_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    equal = [record | {"rewards": [0.0] * 4} for record in TRAIN]
    half = [record | ({"rewards": [1.0] * 4} if record["set"] == "y" else {}) for record in VALID]
    few = Setup(SETUP.job, selecting=Selecting(fraction=0.05))
    for train, valid, setup, error, message in (
        (equal, VALID, SETUP, NothingToSelect, "train: there is nothing to select: none of the 12"),
        (TRAIN, half, SETUP, CropiError, "validation set 'y' usefully: none of its 4 prompts"),
        (TRAIN, VALID, few, CropiError, "fraction 0.05 of a pool of 12 prompts chooses none"),
        (TRAIN, {"x": []}, SETUP, CropiError, "valid is empty"),
    ):
        with pytest.raises(error, match=message):
            quiet(policy(), train, valid, setup, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CropiError, match="sets: no trajectory covers the validation set 'z'; there are"):
        check(policy(), TRAIN, VALID, SETUP, sets=["z"], option="sets")


@pytest.mark.long
def test_known_prompts_alone_are_chosen() -> None:
    known = {record["id"] for record in TRAIN[::2]}
    checked = check(policy(), TRAIN, VALID, SETUP, known=known.__contains__)
    assert (checked.prompts, checked.unknown) == (6, 6) and checked.train.scan.prompts == 6
    chosen = quiet(policy(), TRAIN, VALID, SETUP, checked=checked)
    assert set(chosen.scores.ids) == known and len(chosen) == 1
    want = quiet(policy(), TRAIN[::2], VALID, SETUP)
    np.testing.assert_array_equal(chosen.scores.table, want.scores.table)
    with pytest.raises(
        CropiError, match="none of the trajectories in train belongs to a prompt of the dataset"
    ):
        check(policy(), TRAIN, VALID, SETUP, known=lambda name: False)


@pytest.mark.long
def test_ranks_share_the_prompts_and_all_get_the_selection(tmp_path: Path) -> None:
    train, valid = write_lines(tmp_path / "t.jsonl", TRAIN), write_lines(tmp_path / "v.jsonl", VALID)
    policies = [policy() for _ in range(3)]  # transformers is not imported by several threads at once
    found = on_ranks(
        3, lambda ranks: quiet(policies[ranks.rank], train, valid, SETUP, tmp_path / "out", ranks)
    )
    alone = quiet(policy(), train, valid, SETUP)
    assert len(found) == 3 and all(chosen.ids == alone.ids for chosen in found)
    # Other neighbours in the batch: float32 sums in another order.
    np.testing.assert_allclose(found[1].scores.table, alone.scores.table, rtol=1e-4, atol=1e-5)
    stores = sorted(path.name for path in (tmp_path / "out/sketches").iterdir())
    assert stores == [f"{name}-{rank:05d}" for name in ("train", "valid") for rank in range(3)]
    with pytest.raises(CropiError, match="folder is None, but 3 processes share the work"):
        checked = check(policy(), train, valid, SETUP)
        quiet(
            policy(), train, valid, SETUP, None, Threads(0, [b""] * 3, threading.Barrier(3)), checked=checked
        )


def test_ctrl_c_says_which_store_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cropi.sketching import groups

    class Pressed(groups.Interrupt):
        def __enter__(self) -> Pressed:
            super().__enter__()
            self.asked = True
            return self

    monkeypatch.setattr(groups, "Interrupt", Pressed)
    with pytest.raises(Interrupted) as error:
        quiet(policy(), TRAIN, VALID, SETUP, tmp_path / "out")
    assert error.value.out == tmp_path / "out/sketches/valid" and error.value.summary.interrupted


# ------------------------------------------------------------------------------------------------- options
def test_options_are_one_with_the_modules_that_use_them() -> None:
    from dataclasses import fields

    from cropi import options
    from cropi.gradient.behaviour import BEHAVIOURS
    from cropi.gradient.estimators import ESTIMATORS
    from cropi.gradient.layout import LAYOUTS
    from cropi.gradient.tokenize import TOO_LONG
    from cropi.model.adapting import QUANTIZE
    from cropi.model.placing import DTYPES
    from cropi.ranking.influence import METRICS
    from cropi.store.codec import DTYPES as STORED
    from cropi_kernels import SketchSpec
    from cropi_kernels.spec import KINDS

    held = {
        about.name: about
        for one in (options.Sketching, options.Influence, options.Selecting, options.Loading)
        for about in fields(one)
    }
    for name, wanted in (
        ("behaviour", BEHAVIOURS), ("estimator", ESTIMATORS), ("layout", LAYOUTS), ("too_long", TOO_LONG),
        ("dtype", ("auto", *DTYPES)), ("quantize", QUANTIZE),
        ("metric", METRICS), ("store_dtype", STORED), ("kind", KINDS),
    ):  # fmt: skip
        assert set(held[name].metadata["choices"]) == set(wanted), name
    for about in fields(SketchSpec):
        if about.name != "version":
            assert held[about.name].default == about.default, about.name


def test_scores_and_selections_of_options_are_those_of_their_functions() -> None:
    stores = {}
    checked = check(policy(), TRAIN, VALID, SETUP)
    stores = pipeline.sketch_all(policy(), checked, SETUP, lambda name: None, progress=False)
    scores = pipeline.score(stores["train"], [stores["valid"]], Influence(metric="dot", mean="normalised"))
    assert scores.meta["metric"] == "dot" and scores.meta["mean"] == "normalised"
    assert select(scores, Selecting(fraction=0.5, method="max")).method == "max"
