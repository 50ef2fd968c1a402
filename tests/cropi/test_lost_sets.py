"""Validation sets without a gradient, where prompts were chosen before: left out, with a warning, and no end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_curriculum import config, curriculum, make_folder, report
from support.made_data import make_model, make_records, make_tokenizer
from support.rank_threads import on_ranks

from cropi import pipeline, score
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.options import Influence, Rescoring, Selecting
from cropi.pipeline import NothingToFollow, conclude
from cropi.pipeline.checks import Setup
from cropi.pipeline.lost import LostSets, TooFewLeft
from cropi.pipeline.rescoring import Anew
from cropi.ranking.shares import NotInPool
from cropi.sketching.job import SketchJob
from cropi.store.memory import MemoryStore
from cropi.store.rows import SKIPPED, RowInfo
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")

SPEC = SketchSpec(dim=64)
P_SELECTED = Selecting(method="p_selected", fraction=0.5)


def store(rows: dict[str, float], name: str | None = None) -> MemoryStore:
    """Sketches of prompts, and prompts whose gradients are zero though their rewards differ; another number is a factor
    on the sketch of the prompt before."""
    made = MemoryStore({"spec": SPEC.to_dict(), "stage": "1", "prompts": len(rows)})
    for number, (key, usable) in enumerate(rows.items()):
        row = RowInfo(key, set=name and key[0], pass_rate=0.5)
        factor = 1.0 if usable in (0, 1) else usable
        sketch = (
            torch.randn(SPEC.dim, generator=torch.Generator().manual_seed(number - (factor != 1))) * factor
        )
        made.add(*((row, sketch) if usable else (RowInfo(key, SKIPPED, "zero gradient", set=row.set),)))
    made.finish()
    return made


def chosen(valid: dict[str, float], later: bool = True, **given: Any) -> Any:
    stores = {"train": store({f"t{i}": True for i in range(4)}), "valid": store(valid, "valid")}
    setup = Setup(
        influence=Influence(**given), selecting=Selecting(fraction=0.5), later=later, before="stage 1: "
    )
    return conclude(stores, setup, None)


def test_a_set_of_one_prompt_ends_no_training() -> None:
    """Evaluations may leave a set one prompt with a gradient, and nothing can be drawn anew then."""
    model, tokenizer = make_model(), make_tokenizer()
    valid = [record for record in make_records(8, seed=1) if len(set(record["rewards"])) > 1][:1]
    for later, kind in ((False, NotInPool), (True, TooFewLeft)):
        setup = Setup(SketchJob((), None, spec=SPEC), Influence(), P_SELECTED, least=2, later=later)
        with pytest.raises(kind, match="method p_selected needs resampled scores, and") as error:
            pipeline.check(Policy(model, tokenizer), make_records(8), valid, setup)
        assert type(error.value) is kind


def test_a_set_whose_gradients_vanish_is_left_out() -> None:
    """It ended every stage: sequence ratios that are all clipped, say."""
    valid = {"x1": True, "x2": True, "y1": False, "y2": False}
    with pytest.raises(CropiError, match="validation set 'y' has no usable prompt"):
        chosen(valid, later=False)
    words = r"^stage 1: no prompt of the validation set 'y' has a usable gradient \(2 with zero gradient\); the set"
    with pytest.warns(LostSets, match=words):
        found = chosen(valid)
    assert found.scores.sets == ["x"]
    alone = chosen({"x1": True, "x2": True})
    assert found.ids == alone.ids and (found.scores.table == alone.scores.table).all()
    with pytest.warns(LostSets):
        without = chosen(valid, minus="y", minus_weight=0.5)
    assert (without.scores.table == alone.scores.table).all() and "minus" not in without.scores.meta
    for given in ({}, {"minus": "x"}):
        left = valid if given else dict.fromkeys(valid, False)
        with pytest.raises(
            NothingToFollow, match="no prompt of the validation set 'y' has a usable gradient"
        ):
            chosen(left, **given)


def test_a_set_whose_gradients_add_up_to_zero_is_left_out_where_its_mean_counts() -> None:
    """It ended every later stage."""
    valid = {"x1": True, "x2": True, "y1": True, "y2": -1.0}
    alone = chosen({"x1": True, "x2": True})
    words = "validation set 'y': the mean of its gradients is zero, so it has no direction"
    with pytest.raises(CropiError, match=f"^{words}; leave the set out"):
        chosen(valid, later=False)
    for given in ({}, {"minus": "y", "minus_weight": 0.5}, {"draws": 0}):
        with pytest.warns(LostSets, match=f"^stage 1: {words}; the set does not count"):
            found = chosen(valid, **given)
        assert found.scores.sets == ["x"] and (found.scores.table == alone.scores.table).all()
    with pytest.raises(NothingToFollow, match=words):
        chosen(valid, minus="x")
    # Of one prompt, or of the nearest one, there is a direction.
    for given in ({"max_valid": 1}, {"aggregate": "nearest"}):
        assert chosen(valid, **given).scores.sets == ["x", "y"]


@pytest.mark.filterwarnings(
    "ignore::cropi.data.twice.RepeatedPrompts", "ignore::cropi.ranking.influence.SharedPrompts"
)
def test_gradients_that_cancel_are_refused_early_by_the_options_alone(tmp_path: Path) -> None:
    """The check before the training prompts knew of no options: it refused what `aggregate="nearest"` can score."""
    model, records = make_model(), make_records(4)
    record = next(one for one in records if len(set(one["rewards"])) == 2)
    turned = [1.0 - reward for reward in record["rewards"]]
    valid = [record, record | {"id": "turned", "rewards": turned}]
    options: dict[str, Any] = {"tokenizer": make_tokenizer(), "dim": 64, "draws": 0, "progress": False}
    setup = Setup(SketchJob((), None, spec=SPEC), Influence(draws=0), Selecting(fraction=0.5))
    with pytest.raises(CropiError, match="the mean of its gradients is zero"):
        pipeline.choose(Policy(model, options["tokenizer"]), records, valid, setup, tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "sketches").iterdir()] == ["valid"], "no training prompt"
    near = score(model, records, valid, aggregate="nearest", **options).table
    assert abs(near[[one["id"] for one in records].index(record["id"])]).max() == pytest.approx(1.0)


@pytest.mark.long
@pytest.mark.parametrize("passes", [None, 0.5])
def test_every_rank_is_told_before_training_prompts_are_sketched(
    passes: float | None, tmp_path: Path
) -> None:
    """With passes only rank 0 was: the other ones ended the training by an error, 'rank 0 failed with'."""
    # Answers that are all alike: their advantages add up to zero.
    alike = [
        record | {"responses": [record["responses"][0]] * len(record["responses"])}
        for record in make_records(4, seed=1, sets=["x"])
    ]
    setup = Setup(
        SketchJob((), None, spec=SPEC, stage="1"),
        selecting=Selecting(fraction=0.5),
        later=True,
        before="stage 1: ",
    )
    policies = [Policy(make_model(), make_tokenizer()) for _ in range(2)]

    def choose(ranks: Any, policy: Policy) -> Any:
        folder = tmp_path / f"{ranks.world}"
        anew = passes and Anew(Rescoring(passes=passes), folder, folder / "kept", None, ())
        return pipeline.choose(
            policy, make_records(8), alike, setup, folder, ranks, anew=anew or None, progress=False
        )

    for ranks in (1, 2):
        for error in on_ranks(ranks, lambda one: choose(one, policies[one.rank])):
            assert isinstance(error, NothingToFollow), error
            assert (
                "no prompt of the validation set 'x' has a usable gradient (1 with equal rewards, 3 with"
                in str(error)
            )
        made = {path.name.split("-")[0] for path in (tmp_path / f"{ranks}/sketches").iterdir()}
        assert made == {"valid"} or (ranks == 2 and passes is None)


@pytest.mark.long
def test_rollouts_of_sets_that_are_solved_by_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One set in the second stage, all in the third: each ended the run, whose rollouts were of every stage."""
    made = make_folder(tmp_path / "made")
    script = tmp_path / "roll.py"
    script.write_text(
        "import json, sys\n"
        "source, train, valid, stage = sys.argv[1:]\n"
        "lines = [json.loads(line) for line in open(source)]\n"
        "with open(train, 'w') as file:\n"
        "    file.writelines(json.dumps(line) + '\\n' for line in lines[:6])\n"
        "with open(valid, 'w') as file:\n"
        "    for i, line in enumerate(lines[6:14]):\n"
        "        name = 'xy'[i % 2]\n"
        "        solved = name in ['', 'y', 'xy'][int(stage)]\n"
        "        rewards = [float(not solved and k == 0) for k, _ in enumerate(line['rewards'])]\n"
        "        file.write(json.dumps(line | {'set': name, 'rewards': rewards, 'made_at': stage}) + '\\n')\n"
    )
    roll = f"{sys.executable} {script} {made / 'train.jsonl'} {{train}} {{valid}} {{stage}}"
    out = tmp_path / "run"
    path = config(
        made, out, train=None, valid=None, rollouts=roll, rollouts_when="every", stages=3, fraction=0.5,
        sets=["x", "y"], influence={"minus": "y", "minus_weight": 0.5}, behaviour="current",
    )  # fmt: skip
    assert curriculum(path) == 0
    assert [sorted(row["scores"]) for row in report(out)] == [["x"]] * 3
    words = "none of the 4 prompts of the validation set 'y' has a gradient (4 with equal rewards)"
    said = capsys.readouterr().err
    assert f"stage 1: {words}; the set does not count until" in said
    assert f"; {words}; the validation rollouts before are kept" in said
    done = json.loads((out / "state.json").read_text())["done"]
    sketched = [entry["valid"]["valid"]["files"] for entry in done if entry["step"] == "sketch"]
    assert [Path(file).parent.parent.name for (file,) in sketched] == ["stage-00", "stage-01", "stage-01"]


@pytest.mark.long
def test_a_stage_of_a_curriculum_ends_where_all_gradients_vanish_and_not_where_those_of_one_set_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_folder(tmp_path / "made")
    script = tmp_path / "roll.py"
    script.write_text(
        "import json, sys\n"
        "source, valid, stage = sys.argv[1:]\n"
        "lines = [json.loads(line) for line in open(source)]\n"
        "with open(valid, 'w') as file:\n"
        "    for line in lines[:4]:\n"
        "        texts = line['responses']\n"
        "        gone = line['set'] in ['', 'y', 'xy'][int(stage)]\n"
        "        alike = [texts[0]] * len(texts) if gone else texts\n"
        "        file.write(json.dumps(line | {'responses': alike, 'made_at': stage}) + '\\n')\n"
    )
    roll = f"{sys.executable} {script} {made / 'valid.jsonl'} {{valid}} {{stage}}"
    path = config(
        made, tmp_path / "run", valid=None, rollouts=roll, rollouts_when="every", stages=3, fraction=0.5,
        passes=0.8, behaviour="current",
    )  # fmt: skip
    assert curriculum(path) == 2
    said = capsys.readouterr().err
    assert "stage 1: no prompt of the validation set 'y' has a usable gradient" in said
    assert (tmp_path / "run/stage-01/report.html").is_file(), (
        "its page looked for neighbours in the set that is gone"
    )
    assert "stage 2: no prompt of the validation set" in said and "no other set is left to select for" in said
    # Before the long part.
    assert sorted(one.name for one in (tmp_path / "run/stage-02/sketches").iterdir()) == ["valid-valid"]
