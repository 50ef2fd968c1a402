"""Scoring within a budget: the rule, what it loses on a stream that drifts, and stages of a curriculum that obey it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.made_curriculum import config, curriculum, make_folder, report, selections
from support.made_data import make_model
from support.stores import sketches_of

import cropi
from cropi.cli import main
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.options import Rescoring, Selecting, Sketching
from cropi.pipeline.rescoring import Anew, Pool, _row
from cropi.ranking.cut import EXPLORE, Drift, affordable, anew, spreads
from cropi.ranking.rule import Rule
from cropi.ranking.table import read_scores
from cropi.sketching.job import make_job
from cropi.sketching.run import sketch
from cropi.store.earlier import open_together
from cropi.store.rows import OK, RowInfo
from cropi.store.store import SketchStore

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


# ------------------------------------------------------------------------------------------------------- the rule
class Stream:
    """Prompts whose scores walk at random: by ``drift`` standard deviations of the pool in a stage."""

    def __init__(self, seed: int, n: int = 400, drift: float = 0.3, fraction: float = 0.1) -> None:
        self.rng, self.drift, self.n = np.random.default_rng(seed), drift, n
        self.ids = [f"p{i:03d}" for i in range(n)]
        self.rule = Rule([RowInfo(name) for name in self.ids], np.arange(n), Selecting(fraction=fraction))
        self.true = self.rng.standard_normal((n, 1))
        self.held, self.age = self.true.copy(), np.zeros(n)
        self.costs = self.rng.integers(1, 20, n).astype(float)

    def walk(self) -> None:
        self.true = self.true + self.drift * self.rng.standard_normal(self.true.shape)
        self.age += 1

    def score(self, places: list[int]) -> None:
        self.held[places], self.age[places] = self.true[places], 0

    def regret(self) -> float:
        """What the chosen ones lack to the best ones, of their sum."""
        best = self.true[self.rule.choose(self.true), 0].sum()
        return float(best - self.true[self.rule.choose(self.held), 0].sum())

    def bound(self) -> float:
        """The expected regret is at most ``sum_i s_i f(d_i / s_i)``, f(z) = phi(z) - z (1 - Phi(z)).

        A prompt's true score is the held one plus a normal number e_i with standard deviation ``s_i = drift sqrt(age)``
        that is independent of all decisions, and d_i is the distance of the held score from the lowest chosen one, t.
        The regret is sum (c_i - t) over the best minus that over the chosen. A prompt that is missing adds at most
        (c_i - t)^+ = (e_i - d_i)^+, one that is chosen wrongly (t - c_i)^+ = (-e_i - d_i)^+; E (e - d)^+ = s f(d / s).
        """
        chosen = self.rule.choose(self.held)
        distance = np.abs(self.held[:, 0] - self.held[chosen, 0].min())
        s = self.drift * np.sqrt(self.age)
        z = distance[s > 0] / s[s > 0]
        tail = np.array([math.erfc(value / math.sqrt(2)) / 2 for value in z])
        return float((s[s > 0] * (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) - z * tail)).sum())


def streamed(seed: int, share: float, uniform: bool, stages: int = 10) -> tuple[float, float, Drift]:
    """Mean regret and mean bound over the stages, and the drift that was measured on the way."""
    stream, drift, regrets, bounds = Stream(seed), Drift(), [], []
    for stage in range(stages):
        stream.walk()
        tokens = share * stream.costs.sum()
        if uniform:
            order = stream.rng.permutation(stream.n)
            places = order[np.cumsum(stream.costs[order]) <= tokens].tolist()
        else:
            places = anew(
                stream.held, stream.age, stream.costs, stream.ids, stream.rule, tokens=tokens, drift=drift,
                seed=stage,
            )  # fmt: skip
            assert len(set(places)) == len(places) and stream.costs[places].sum() <= tokens
            drift = drift.seen(
                stream.held[places], stream.true[places], stream.age[places], spreads(stream.held)
            )
        stream.score(places)
        regrets.append(stream.regret())
        bounds.append(stream.bound())
    return float(np.mean(regrets)), float(np.mean(bounds)), drift


@pytest.mark.long
def test_regret_on_a_stream_that_drifts() -> None:
    """A fifth of the tokens, put near the cut, loses less than a fifth of what uniform re-scoring loses (a ninth is
    measured), and no more than the bound says of what was left."""
    runs = {uniform: [streamed(seed, 0.2, uniform) for seed in range(4)] for uniform in (False, True)}
    mine, other = (np.array([run[0] for run in runs[uniform]]) for uniform in (False, True))
    for uniform in (False, True):
        regret, bound = (np.array([run[k] for run in runs[uniform]]) for k in (0, 1))
        assert regret.mean() <= bound.mean() + 3 * (regret - bound).std(ddof=1) / len(regret) ** 0.5
    assert mine.mean() < 0.2 * other.mean(), (mine, other)


def test_the_drift_is_measured() -> None:
    """The stream's own is 0.3 deviations of its first pool, which widens from 1 to sqrt(1 + 0.09 * 10)."""
    for seed in range(3):
        found = streamed(seed, 0.2, False)[2]
        assert found.count > 100
        assert 0.3**2 / (1 + 10 * 0.3**2) * 0.7 < found.variance < 0.3**2 * 1.3
    before, after = np.array([[0.0], [1.0], [np.nan]]), np.array([[0.6], [1.0], [3.0]])
    drift = Drift(1.0, 2).seen(before, after, np.array([1.0, 4.0, 1.0]), np.array([2.0]))
    assert (drift.total, drift.count) == (pytest.approx(1.0 + 0.09), 4)


def found_first(seed: int, tied: float, told: bool) -> float:
    """The share of the best tenth of prompts without a sketch that a fifth of the tokens finds.

    Three tenths of 600 prompts have a score. Scores follow the pass rate (of 8 responses) by ``tied`` times their
    spread, which a rate doubles or halves; ``told``: whether the rule sees the rates.
    """
    rng, n = np.random.default_rng(seed), 600
    rates = rng.integers(1, 8, n) / 8
    true = (tied * (rates - 0.5) + 2 ** (tied * (rates - 0.5)) * rng.standard_normal(n))[:, None]
    rows = [RowInfo(f"p{i:03d}", pass_rate=rates[i] if told else 0.5) for i in range(n)]
    rule, known = Rule(rows, np.arange(n), Selecting(fraction=0.1)), rng.permutation(n)[: 3 * n // 10]
    table, best = np.full((n, 1), np.nan), np.setdiff1d(rule.choose(true), known)
    table[known] = true[known]
    places = anew(
        table, np.ones(n), rng.integers(1, 20, n).astype(float), rule.ids, rule, tokens=0.2 * 10 * n,
        drift=Drift(), seed=seed,
    )  # fmt: skip
    return len(np.intersect1d(places, best)) / len(best)


@pytest.mark.parametrize("tied", [1.0, -1.0, 0.0])
def test_pass_rates_tell_which_prompts_are_sketched_first(tied: float) -> None:
    """More of the best are found where scores follow pass rates, upwards or downwards; where not, no fewer are."""
    runs = np.array([[found_first(seed, tied, told) for told in (True, False)] for seed in range(24)])
    gain = runs[:, 0] - runs[:, 1]
    error = gain.std(ddof=1) / len(gain) ** 0.5
    if tied:
        assert gain.mean() > max(0.1, 4 * error), (gain.mean(), error)
    else:
        assert abs(gain.mean()) <= 4 * error, (gain.mean(), error)


def test_what_is_taken_when_it_is_known_and_when_not() -> None:
    """Exact scores far from the cut stay; the cut, and what was never scored, come first; all of it is repeatable."""
    n = 60
    ids = [f"p{i:02d}" for i in range(n)]
    rule = Rule([RowInfo(name) for name in ids], np.arange(n), Selecting(fraction=0.1))
    table = np.linspace(0, 30, n)[:, None].copy()
    table[7] = np.nan
    given: dict[str, Any] = dict(
        ages=np.ones(n), costs=np.ones(n), ids=ids, rule=rule, drift=Drift(0.0, 10**6)
    )
    places = anew(table, tokens=10.0, seed=1, **given)
    assert places == anew(table, tokens=10.0, seed=1, **given) != anew(table, tokens=10.0, seed=2, **given)
    explored = round(EXPLORE * 10)
    assert len(places) == 10 and 7 in places, "nothing but the prompt without a score is uncertain"
    wide = anew(table, tokens=10.0, seed=1, **(given | {"drift": Drift(0.02 * 10**6, 10**6)}))
    assert {53, 54} <= set(wide[explored:]), "the last that is chosen, and the first that is not"
    assert anew(table, tokens=60.0, seed=1, **given) == list(range(n))
    assert anew(table, tokens=0.5, seed=1, **given) == []
    unknown = np.full((n, 1), np.nan)
    first = anew(unknown, tokens=10.0, seed=3, **given)
    assert len(first) == 10 and first == anew(unknown, tokens=10.0, seed=3, **given)
    seen = np.zeros(n)
    for seed in range(600):
        seen[anew(unknown, tokens=10.0, seed=seed, **given)] += 1 / 600
    # A uniform subset: four standard deviations of a share of so many draws.
    assert (np.abs(seen - 1 / 6) <= 4 * math.sqrt(5 / 36 / 600)).all()


def test_a_share_of_the_time() -> None:
    """S = spent + c n seconds of choosing are a share b of S + R."""
    for share, others, spent, cost in ((0.05, 1900.0, 40.0, 0.01), (0.3, 7.0, 1.0, 0.5)):
        tokens = affordable(share, others, spent, cost)
        choosing = spent + cost * tokens
        assert choosing / (choosing + others) == pytest.approx(share)
    assert affordable(0.05, 100.0, 50.0, 0.01) == 0 and affordable(1.0, 0.0, 9.0, 1.0) == math.inf


@pytest.mark.parametrize("few", [{}, {"token_share": 0.3}, {"responses": 2}])
def test_what_a_token_costs_is_told_by_the_tokens_that_a_pool_counts(few: dict[str, Any]) -> None:
    """Tokens of tools, equal responses and tokens that are not drawn: a budget paid for a part of its tokens only."""
    ids = [[8, 9, 10, 1], [8, 9, 10, 1], [7, 6, 5, 1], [5, 9, 1]]
    masked = {
        "response_ids": ids,
        "rewards": [1.0, 0.5, 0.0, 0.0],
        "loss_mask": [[0, 0, 0, 1]] * 3 + [[0, 0, 1]],
    }
    records = [{"id": f"{i}", "prompt_ids": [3 + i, 4], **masked} for i in range(3)]
    pool = Pool([_row(group, few.get("responses")) for group in read(records)])
    job = make_job(Sketching(dim=256, verify=False, **few), read(records), None)
    timed = Anew(Rescoring(), Path(), Path(), None, [])
    timed.took(sketch(Policy(make_model()), job, progress=False))
    assert (
        timed.passed == pool.costs.sum() == 3 * round(15 * few.get("responses", 4) / 4) and timed.seconds > 0
    )


def test_bad_bounds_are_named() -> None:
    for name in ("budget", "passes"):
        for value in (0, -0.1, 1.5, math.nan):
            with pytest.raises(CropiError, match=rf"{name} must be (in \(0, 1\]|a finite number)"):
                Rescoring(**{name: value})
    assert not Rescoring().asked and Rescoring(passes=1.0).asked


# ------------------------------------------------------------------------------------------- stages of a curriculum
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("rescoring"))


@pytest.fixture(scope="module")
def bounded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, each of which passes at most two fifths of the tokens."""
    out = tmp_path_factory.mktemp("bounded") / "run"
    assert curriculum(config(made, out, stages=3, passes=0.4)) == 0
    return out


def plan_of(out: Path, stage: int) -> dict[str, Any]:
    return dict(json.loads((out / f"stage-{stage:02d}" / "anew.json").read_text()))


@pytest.mark.long
def test_stages_keep_what_they_do_not_score(
    bounded: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        record["id"]: max(sum(map(len, record["responses"])) // 4, 1)
        for record in map(json.loads, (made / "train.jsonl").read_text().splitlines())
        if len(set(record["rewards"])) > 1
    }
    made_at: dict[str, int] = {}
    for stage in range(3):
        plan, folder = plan_of(bounded, stage), bounded / f"stage-{stage:02d}"
        assert sum(sizes[name] for name in plan["ids"]) == plan["spent"] <= plan["tokens"]
        assert plan["tokens"] == pytest.approx(0.4 * sum(sizes.values()))
        made_at |= dict.fromkeys(plan["ids"], stage)
        scores = read_scores(folder / "scores.parquet")
        assert len(scores.rows) == 40
        for row in scores.rows:
            if row.id not in sizes:
                assert row.status != OK
            elif row.id not in made_at:
                assert row.reason == "beyond the budget" and row.status == "skipped"
            else:
                at = row.extra.get("scored_at", str(stage))
                assert row.status == OK and at == str(made_at[row.id])
        # A kept score: the earlier sketch, as it was stored, against this stage's validation mean.
        valid = SketchStore.open(folder / "sketches" / "valid-valid")
        new = sketches_of(valid)
        places = {row.id: i for i, row in enumerate(scores.rows)}
        for v, name in enumerate(scores.sets):
            mean = torch.stack([new[row.id] for row in valid.rows() if row.set == name and row.id in new])
            mean = mean.double().mean(0)
            for prompt, at in made_at.items():
                old = SketchStore.open(bounded / f"stage-{at:02d}" / "sketches" / "train")
                vector = sketches_of(old)[prompt].double()
                want = float(vector @ mean / vector.norm() / mean.norm())
                assert scores.table[places[prompt], v] == pytest.approx(want, abs=5e-6)
        entry = report(bounded)[stage]
        assert entry["anew"] == len(plan["ids"]) and entry["anew"] + entry["left"] == len(sizes)
    later = plan_of(bounded, 2)
    assert set(later["ages"]) <= {0, 1, 2} and later["drift"][1] > 0, "stage 1 showed how far scores move"
    assert any(before is not None for before in later["before"])
    assert main(["info", str(bounded / "stage-02" / "anew.json")]) == 0
    assert f"stage 2 sketches {len(later['ids'])} prompts anew" in capsys.readouterr().out
    text = (bounded / "report.md").read_text("utf-8")
    assert "| scored anew |" in text and f"| {len(later['ids'])} of {len(sizes)} |" in text
    assert "scored anew in stage 2" in (bounded / "report.html").read_text("utf-8")
    assert "scored_at" not in read_scores(bounded / "stage-00" / "scores.parquet").rows[0].extra


@pytest.mark.long
def test_a_whole_budget_is_full_scoring(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert curriculum(config(made, out, budget=1.0, passes=1.0)) == 0
    assert not (out / "stage-01" / "sketches" / "earlier").exists()
    chosen = [[row["id"] for row in stage] for stage in selections(out)]
    files = {name: str(made / f"{name}.jsonl") for name in ("train", "valid")}
    for stage, model in enumerate((made / "model", out / "stage-00" / "trained")):
        beta = str(made / "model") if stage else None
        scores = cropi.score(str(model), **files, behaviour_model=beta, dim=512, progress=False)
        assert chosen[stage] == scores.select(0.2).ids


@pytest.mark.long
def test_a_share_of_the_time_bounds_stages_after_the_first(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert curriculum(config(made, out, budget=1e-6)) == 0
    shown = capsys.readouterr().out
    assert "there are no sketches of an earlier stage: budget bounds the stages after this one" in shown
    first, second = plan_of(out, 0), plan_of(out, 1)
    assert first["tokens"] is None and second["tokens"] == 0 and second["ids"] == []
    rows = report(out)
    assert rows[0]["left"] == 0 and rows[1]["anew"] == 0 and rows[1]["selected"] == 8
    scores = read_scores(out / "stage-01" / "scores.parquet")
    assert {row.extra.get("scored_at") for row in scores.rows if row.status == OK} == {"0"}
    assert not (out / "stage-01" / "sketches" / "train" / "shard-00000.safetensors").exists() or (
        len([row for row in SketchStore.open(out / "stage-01/sketches/train").rows() if row.status == OK])
        == 0
    )


def copied(made: Path, bounded: Path, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The run at another place, and its config: a trainer's command belongs to its settings."""
    nudge, out = yaml.safe_load(config(made, bounded).read_text())["trainer"], folder / "run"
    shutil.copytree(bounded, out)
    return out, config(made, out, trainer=nudge, **({"stages": 3, "passes": 0.4} | changes))


@pytest.mark.long
def test_a_stage_that_goes_on_repeats_its_plan(made: Path, bounded: Path, tmp_path: Path) -> None:
    """Killed after the plan, and inside the sketches that follow it: the same choice, whatever the clock says now."""
    out, path = copied(made, bounded, tmp_path)
    state = json.loads((out / "state.json").read_text())
    del state["checksum"]
    place = [(entry["stage"], entry["step"]) for entry in state["done"]].index((2, "sketch"))
    state["done"] = state["done"][:place]
    (out / "state.json").write_text(json.dumps(state))
    shutil.rmtree(out / "stage-02" / "sketches" / "train")
    kept = out / "stage-02" / "sketches" / "earlier"
    for shard in kept.glob("*.sha256"):
        shard.unlink()  # what is not committed was never written
    assert curriculum(path) == 0
    assert selections(out) == selections(bounded)
    assert plan_of(out, 2)["ids"] == plan_of(bounded, 2)["ids"]


@pytest.mark.long
def test_what_does_not_fit_is_an_error(
    made: Path, bounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value in (("budget", 1.5), ("passes", 0)):
        with pytest.raises(SystemExit):
            curriculum(config(made, tmp_path / "bad", **{flag: value}))
        error = capsys.readouterr().err
        assert f"argument --{flag}: '{value}': give a number in (0, 1]" in error
        assert not (tmp_path / "bad").exists()
    assert curriculum(config(made, tmp_path / "few", passes=0.1)) == 2
    error = capsys.readouterr().err
    assert "8 prompts are to be chosen, but only 3 would have a score" in error and "raise them" in error
    out, path = copied(made, bounded, tmp_path, passes=0.5, stages=4)
    assert curriculum(path) == 2
    assert "sketch.passes = 0.4, but now it is 0.5" in capsys.readouterr().err
    shutil.rmtree(out)
    out, path = copied(made, bounded, tmp_path, stages=4)
    shutil.rmtree(out / "stage-02" / "sketches")
    assert curriculum(path) == 2
    error = capsys.readouterr().err
    assert "the sketches of the stage before are gone" in error and "anew.json" in error
    with pytest.raises(CropiError, match="stored as float32, and .* as float16"):
        half = open_together([bounded / "stage-02" / "sketches" / "train"])
        assert half is not None
        with SketchStore.create(tmp_path / "half", half.manifest | {"dtype": "float16", "prompts": 0}):
            pass
        open_together([bounded / "stage-02" / "sketches" / "train", tmp_path / "half"])
