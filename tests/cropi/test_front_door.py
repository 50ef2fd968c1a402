"""``import cropi``: what is public, in memory as from files, and what misuse of it says."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.oracle import with_token_ids

import cropi
from cropi.cli import main
from cropi.errors import CropiError, warn
from cropi.progress import bar_of
from cropi.ranking.influence import SharedPrompts
from cropi.ranking.scores import Scores
from cropi.ranking.selection_files import read_selection
from cropi.ranking.table import read_scores
from cropi.sketching import groups
from cropi.store.memory import MemoryStore
from cropi.store.rows import RowInfo
from cropi_kernels._level import level_of_caller

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
TRAIN, VALID = make_records(12), make_records(8, seed=1, sets=["x", "y"])
SMALL: dict[str, Any] = {"dim": 1024, "progress": False}


def exact(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with token ids, which need no tokenizer."""
    return [with_token_ids(record) for record in records]


@pytest.fixture(scope="module")
def scores() -> Scores:
    return cropi.score(make_model(), TRAIN, VALID, make_tokenizer(), **SMALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    save_policy(folder / "model")
    write_lines(folder / "train.jsonl", TRAIN)
    write_lines(folder / "valid.jsonl", VALID)
    return folder


# --------------------------------------------------------------------------------------------- results
def test_a_choice_of_any_size_has_its_own_uncertainty(scores: Scores) -> None:
    """`p_selected` is the chance to be chosen among so many; they add up to their number."""
    again = cropi.score(make_model(), TRAIN, VALID, make_tokenizer(), fraction=0.25, **SMALL)
    np.testing.assert_array_equal(again.table, scores.table)
    assert sum(again.select(0.25).weights.values()) == pytest.approx(3)
    with pytest.raises(CropiError, match="of choices of 1 prompts, and this selection has 3"):
        _ = scores.select(0.25).weights
    train, valid = (cropi.sketch(make_model(), part, make_tokenizer(), **SMALL) for part in (TRAIN, VALID))
    two = cropi.influence(train, valid, count=2)
    assert sum(two.select(count=2).weights.values()) == pytest.approx(2)


@pytest.mark.long
def test_memory_files_and_the_command_line_agree_to_the_bit(
    scores: Scores, saved: Path, tmp_path: Path
) -> None:
    words = f"run --model {saved}/model --train {saved}/train.jsonl --valid {saved}/valid.jsonl --dim 1024"
    assert main([*words.split(), "--out", str(tmp_path / "out"), "--fraction", "0.25", "--no-progress"]) == 0
    table = read_scores(tmp_path / "out/scores.parquet")
    assert table.ids == scores.ids and table.sets == scores.sets == ["x", "y"]
    np.testing.assert_array_equal(table.table, scores.table)
    assert scores.select(0.25).ids == read_selection(tmp_path / "out/selected.jsonl")

    named = cropi.score(str(saved / "model"), saved / "train.jsonl", [saved / "valid.jsonl"], **SMALL)
    policy = cropi.Policy(make_model(), make_tokenizer())
    store = cropi.sketch(policy, TRAIN, out=tmp_path / "train", **SMALL)
    valid = cropi.sketch(policy, VALID, **SMALL)
    parts = cropi.influence(store, valid)
    ids_alone = cropi.score(make_model(), exact(TRAIN), exact(VALID), **SMALL)
    for other in (named, parts, ids_alone):
        np.testing.assert_array_equal(other.table, scores.table)
    again = cropi.sketch(policy, TRAIN, out=tmp_path / "train", **SMALL)
    assert len(again) == 12 and type(again) is cropi.SketchStore and isinstance(valid, MemoryStore)
    assert cropi.select(parts, 0.25).ids == scores.select(0.25).ids


def test_other_holders_of_the_same_records(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra 'trl')")
    held = datasets.Dataset.from_list(TRAIN)
    sets = {"x": VALID[::2], "y": VALID[1::2]}
    shown: list[str] = []
    monkeypatch.setattr(
        groups, "bar_of", lambda left, name, show: (shown.append(name), bar_of(left, name, show))[1]
    )
    got = cropi.score(make_model(), held, sets, make_tokenizer(), **SMALL)
    assert got.sets == ["x", "y"]
    assert shown == ["valid['x']", "valid['y']", "train"], "the bars named stores that nobody sees"
    np.testing.assert_array_equal(got.table, scores.table)


@pytest.mark.long
def test_names_of_sets_are_the_keys_where_records_have_none() -> None:
    plain = [{key: value for key, value in record.items() if key != "set"} for record in VALID]
    got = cropi.score(make_model(), TRAIN, {"a": plain[:4], "b": plain[4:]}, make_tokenizer(), **SMALL)
    assert got.sets == ["a", "b"]
    one = cropi.score(make_model(), TRAIN, plain, make_tokenizer(), **SMALL)
    assert one.sets == ["valid"]


def test_options_reach_the_sketches(scores: Scores) -> None:
    policy = cropi.Policy(make_model(), make_tokenizer())
    store = cropi.sketch(policy, TRAIN, estimator="ppo", seed=3, stage="7", store_dtype="int8", **SMALL)
    manifest = store.manifest
    assert manifest["estimator"]["name"] == "ppo" and manifest["spec"]["seed"] == 3
    assert manifest["stage"] == "7" and manifest["dtype"] == "int8"
    valid = cropi.sketch(policy, VALID, estimator="ppo", seed=3, stage="7", **SMALL)
    dots = cropi.influence(store, valid, metric="dot", mean="normalised", max_valid=2)
    assert dots.meta["metric"] == "dot" and dots.meta["mean"] == "normalised"
    assert not np.array_equal(dots.table, scores.table)


def test_a_sketched_folder_is_continued(tmp_path: Path) -> None:
    policy = cropi.Policy(make_model(), make_tokenizer())
    first = cropi.score(policy, TRAIN, VALID, out=tmp_path / "s", **SMALL)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"train", "valid"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.safetensors")}
    second = cropi.score(policy, TRAIN, VALID, out=tmp_path / "s", **SMALL)
    np.testing.assert_array_equal(first.table, second.table)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.safetensors")} == before


# --------------------------------------------------------------------------------------------- Scores
def test_scores_show_what_they_hold(scores: Scores, tmp_path: Path) -> None:
    assert repr(scores) == f"Scores(12 prompts, {scores.usable.sum()} usable, against 'x', 'y')"
    best = scores.top("x", 3)
    column = scores.table[scores.usable, 0]
    assert [value for _, value in best] == sorted(column, reverse=True)[:3]
    assert all(scores.table[scores.ids.index(name), 0] == value for name, value in best)
    assert len(scores.top("y", np.int64(100))) == scores.usable.sum()
    page = scores._repr_html_()
    assert page.count("<tr>") == 6 and best[0][0] in page
    chosen = scores.select(0.25)
    assert len(chosen) == 3 and chosen.scores is scores and list(chosen) == chosen.ids
    assert repr(chosen).startswith("Selection(3 of 12 prompts by rrf: 'p0-") and chosen.ids[0] in repr(chosen)
    assert chosen._repr_html_().count("<tr>") == 4
    scores.plot(tmp_path / "scores.png", fraction=0.25)
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    for wrong, message in (((None, 5), "set is None: give one of 'x', 'y'"), (("z", 5), "set is 'z'"),
                           (("x", 0), "n must be an integer of at least 1, got 0")):  # fmt: skip
        with pytest.raises(CropiError, match=message):
            scores.top(*wrong)


def test_names_are_escaped_in_notebooks() -> None:
    made = Scores([RowInfo("<b>&")], ["<i>"], np.array([[0.5]]), {})
    assert "<b>" not in made._repr_html_() and "<i>" not in made._repr_html_()
    assert "<b>" not in made.select(1.0)._repr_html_()


def test_scores_as_a_data_frame(scores: Scores) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed (datasets brings it)")
    frame = scores.to_pandas()
    assert list(frame["id"]) == scores.ids and {"score[x]", "score[y]", "norm", "status"} <= set(frame)
    np.testing.assert_array_equal(frame["score[y]"].to_numpy(), scores.table[:, 1])


def test_one_training_prompt_is_enough() -> None:
    good = [record for record in TRAIN if len(set(record["rewards"])) > 1][:1]
    scores = cropi.score(make_model(), good, VALID, make_tokenizer(), **SMALL)
    assert len(scores) == 1 and scores.select(1.0).ids == [good[0]["id"]]


# --------------------------------------------------------------------------------------------- the module
def test_public_names_are_there_and_importing_them_is_lazy() -> None:
    assert sorted(cropi.__all__) == cropi.__all__ and {*cropi.__all__, "options"} <= set(dir(cropi))
    assert "\n        verify: False: leave out the self-test" in str(cropi.options.Sketching.__doc__)
    for name in cropi.__all__:
        assert getattr(cropi, name) is not None
    with pytest.raises(AttributeError, match="module 'cropi' has no attribute 'scores'"):
        cropi.scores  # noqa: B018
    code = (
        "import sys, cropi; assert cropi.__version__; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_version_is_printed_without_torch() -> None:
    code = (
        "import sys, cropi.cli\ntry: cropi.cli.main(['--version'])\nexcept SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cropi", cropi.__version__, "False"]


@pytest.mark.long
def test_influence_is_a_function_also_after_its_old_module_was_imported() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\nimport cropi, torch\nimport cropi.influence\n"
        "from cropi.store.memory import MemoryStore\nfrom cropi.store.shards import RowInfo\n"
        "store = MemoryStore({'spec': {'dim': 64}})\n"
        "store.add(RowInfo('a', norm=1.0), torch.ones(64)); store.finish()\n"
        "print(cropi.influence(store, store).top())\nprint(cropi.influence.score_rows.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[('a', 1.0)]\nscore_rows\n", done.stderr


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_influence_of_sketches_that_no_store_holds(kind: Any) -> None:
    """LESS and others: rows that were projected in any way, against the mean of a set and one by one."""
    generator = torch.Generator().manual_seed(0)
    pool, first, second = (torch.randn(n, 64, generator=generator) for n in (12, 3, 2))
    scores = cropi.influence(kind(pool), {"sums": kind(first), "words": kind(second)}, draws=0)
    assert scores.ids == [f"{row:02d}" for row in range(12)] and scores.sets == ["sums", "words"]
    want = [torch.nn.functional.cosine_similarity(pool, valid.mean(0)[None]) for valid in (first, second)]
    np.testing.assert_allclose(scores.table, torch.stack(want, dim=1).double(), rtol=1e-5, atol=1e-6)
    near, far = cropi.neighbours(kind(pool), kind(first), 1)["1"]
    cosines = torch.nn.functional.cosine_similarity(pool, first[1][None])
    assert (int(near[0].id), int(far[0].id)) == (int(cosines.argmax()), int(cosines.argmin()))


def test_arrays_are_taken_whatever_memory_they_stand_in() -> None:
    """Rows of one length under equal numbers are no sign of one prompt on both sides: no warning."""
    rows = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    want = cropi.influence(torch.as_tensor(rows), torch.as_tensor(rows[:2]), draws=0).table
    fixed = rows.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (rows[::-1].copy()[::-1], fixed, rows.astype(">f4"), rows.astype(np.longdouble)):
            assert np.array_equal(cropi.influence(same, same[:2], draws=0).table, want)
        # Rows of one set in two pieces: both had a row 0, which was said to be one prompt twice.
        split = cropi.influence(rows, [rows[:1], rows[1:2]], draws=0)
    assert split.sets == ["valid"] and np.allclose(split.table, want, atol=1e-6)
    assert list(cropi.neighbours(rows, [rows[:1], rows[1:3]], 1)) == ["0-0", "1-0", "1-1"]


def test_influence_of_sketched_batches() -> None:
    model = make_model()
    rows = torch.randint(3, 30, (6, 5), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[:, :2] = -100

    def sketched(chosen: slice, model: Any = model) -> cropi.SketchedBatch:
        given = {
            "spec": cropi.SketchSpec(1024),
            "weights": torch.ones(len(rows[chosen])),
            "labels": labels[chosen],
        }
        return cropi.score_batch(model, rows[chosen], prompt_ids=[f"p{i}" for i in range(6)][chosen], **given)

    train, valid = sketched(slice(0, 4)), sketched(slice(4, 6))
    scores = cropi.influence(train, valid, draws=0)
    want = torch.nn.functional.cosine_similarity(train.sketches, valid.sketches.mean(0)[None])
    assert scores.ids == ["p0", "p1", "p2", "p3"] and scores.select(0.25).ids == [f"p{int(want.argmax())}"]
    np.testing.assert_allclose(scores.table[:, 0], want.double(), rtol=1e-5, atol=1e-6)
    with cropi.LiveSketcher(model, train.spec) as live, live.batch(torch.arange(4), shape=(4, 5)) as step:
        with pytest.raises(
            CropiError, match=r"^train is LiveSketch\(not filled yet.*: give it when its block has ended$"
        ):
            cropi.influence(step, valid)
        (4 * 3 * model(rows[:4], labels=labels[:4]).loss).backward()
    same = cropi.influence(step, valid, draws=0)
    assert same.ids == ["0", "1", "2", "3"]
    np.testing.assert_allclose(same.table, scores.table, rtol=1e-4, atol=1e-5)
    train.sketches[1], train.sketches[2] = 0, float("nan")
    assert cropi.influence(train, valid, draws=0).usable.tolist() == [True, False, False, True]
    other = sketched(slice(4, 6), make_model(num_hidden_layers=1))
    with pytest.raises(CropiError, match="train and valid cannot be compared: model.parameters"):
        cropi.influence(step, other)
    for side, words in (
        (other, "model.parameters"),
        (valid.sketches, "spec"),
        (train.sketches[:, :64], "spec"),
    ):
        with pytest.raises(CropiError, match=f"train and valid cannot be compared: {words}"):
            cropi.influence(train, side)


def test_records_are_left_as_they_were() -> None:
    before = json.dumps(TRAIN)
    cropi.sketch(make_model(), TRAIN, make_tokenizer(), **SMALL)
    assert json.dumps(TRAIN) == before


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built in place and on the path: the record of a run asks for the version, and ended the run."""
    import importlib.metadata

    import cropi_kernels

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.delitem(vars(cropi), "__version__", raising=False)
    assert cropi.__version__ == cropi_kernels.__version__
    monkeypatch.delitem(vars(cropi), "__version__")


def test_a_warning_points_to_the_line_that_called_this_package() -> None:
    with pytest.warns(SharedPrompts) as caught:
        cropi.score(make_model(), TRAIN, TRAIN, make_tokenizer(), **SMALL)
    assert {warning.filename for warning in caught} == {__file__}


def test_scores_are_saved_and_opened(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.parquet")
    for path in (tmp_path, tmp_path / "scores.parquet"):  # a run's folder, or the file
        again = Scores.open(path)
        assert again.ids == scores.ids and again.sets == scores.sets
        np.testing.assert_array_equal(again.table, scores.table)
        assert again.select(0.1).weights == scores.select(0.1).weights
    with pytest.raises(CropiError, match="nowhere: there is no such score table"):
        Scores.open(tmp_path / "nowhere")
    with pytest.raises(
        CropiError, match="no such score table; a pattern is for .* in Python; give the path of one$"
    ):
        Scores.open(tmp_path / "scores*")


@pytest.mark.parametrize(
    "module", ["transformers.trainer_callback", "peft.peft_model", "transformers_modules.tiny.modeling_tiny"]
)
def test_a_warning_in_a_callback_points_past_the_trainer(module: str) -> None:
    """It named a line of transformers, which calls the callbacks, and lines of PEFT and of a model's own code."""
    trainer: dict[str, Any] = {"__name__": module}
    exec("def call(callback, *words): callback(*words)", trainer)
    kernels: dict[str, Any] = {
        "__name__": "cropi_kernels.taps",
        "level": level_of_caller,
        "warn": warnings.warn,
    }
    exec("def callback(text): warn(text, stacklevel=level())", kernels)
    for callback in (warn, kernels["callback"]):
        with pytest.warns(UserWarning, match="said") as caught:
            trainer["call"](callback, "said")
        assert [warning.filename for warning in caught] == [__file__]


def test_it_is_said_once_that_a_model_is_tried_out(capsys: pytest.CaptureFixture[str]) -> None:
    policy = cropi.Policy(make_model(), make_tokenizer())
    for records in (TRAIN[:2], VALID[:2]):  # as of `cropi run`, whose stores are of one policy
        cropi.sketch(policy, records, dim=64)
    assert capsys.readouterr().err.count("trying out    the model") == 1
