"""The noise that scores have from the finite number of responses: its draws, their sketches, what they do to scores."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.oracle import gradients_of, response_logprobs
from support.stores import in_memory, sketches_of

import cropi
from cropi.cli import main
from cropi.data.records import make_group
from cropi.errors import CropiError
from cropi.gradient.estimators import group_advantages, make_estimator
from cropi.gradient.noise import noise_of, noisy
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting
from cropi.ranking.influence import influence
from cropi.ranking.members import choose_members
from cropi.ranking.pairwise import pairwise
from cropi.ranking.resampling import uncertainty
from cropi.ranking.response_noise import _noise_of, response_noise
from cropi.ranking.table import read_scores
from cropi.ranking.uncertainty import Uncertainty
from cropi.sketching.job import SketchJob, make_tokenize
from cropi.sketching.run import sketch
from cropi.store.merging import merge
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec
from cropi_kernels.testing import sketch_gradients

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
DIM = 4096


# ------------------------------------------------------------------------------------------------- the draw
@pytest.mark.parametrize(
    "rewards", [[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 1], [0.1, 0.7, 0.3, 0.9, 0.2], [0, 0.5, 1]]
)
def test_a_draw_has_the_mean_zero_and_the_covariance_of_the_gradient(rewards: list[float]) -> None:
    """Exactly, for every B: with E s_k = a + b R_k and Cov(s_k) = C, E d = 0 and Cov(d) = Cov(g) = |A|^2 C."""
    advantages = group_advantages(rewards)
    draws = np.random.default_rng(0)
    rounding = 64 * np.finfo(float).eps * len(rewards)
    for number in range(20):
        # Nothing divides small advantages that are not standardised.
        scaled = advantages * (0.01 if number % 2 else 1.0)
        made = noise_of(scaled, draws)
        assert abs(made.sum()) <= rounding and abs(made @ np.array(rewards)) <= rounding * np.linalg.norm(
            made
        )
        assert made @ made == pytest.approx(scaled @ scaled, rel=1e-12)
    made = noise_of(advantages, draws)
    other = noise_of(advantages, draws)
    assert len(rewards) == 3 or not np.allclose(np.abs(made), np.abs(other)), "every draw is another"


def test_noise_that_is_unknown_is_not_zero() -> None:
    rows = torch.eye(3)
    rows[1] = 0
    assert _noise_of([in_memory(rows, "p", skipped="zero gradient")])["p001"] is None
    assert sorted(_noise_of([in_memory(rows, "p", skipped="2 responses")])) == ["p000", "p002"]


def test_a_draw_needs_three_responses_and_two_rewards() -> None:
    with pytest.raises(ValueError, match="at least 3 are needed to draw their noise, got 2"):
        noise_of([0.7, -0.7], np.random.default_rng(0))
    with pytest.raises(ValueError, match="all of them are equal"):
        noise_of([0.0, 0.0, 0.0], np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------- its sketch
@pytest.mark.parametrize("name", ["cropi", "ppo", "dapo"])
def test_sketches_of_noise_are_those_of_autograd(name: str) -> None:
    """The objective written out in float64, one response at a time, with B in the place of A; A decides what is
    clipped. Two of the responses are equal."""
    model, tokenizer, estimator = make_model(), make_tokenizer(), make_estimator(name)
    records = make_records(5, responses=5)
    for number, record in enumerate(records):
        record["rewards"] = [1.0, 0.0, 0.0, 1.0, 0.0] if number else [1.0, 0.0, 0.25, 0.5, 0.0]
        record["responses"][1] = record["responses"][0]
    records.append(records[0] | {"id": "two", "responses": ["1", "23"], "rewards": [1.0, 0.0]})
    tokens = make_tokenize(Policy(model, tokenizer), SketchJob((), None))
    wide, spec, wanted = copy.deepcopy(model).double(), SketchSpec(dim=DIM), {}
    for number, record in enumerate(records):
        group = tokens(make_group(record, f"x:{number}"))
        parts = [response_logprobs(wide, group.prompt, response) for response in group.responses]
        rng = torch.Generator().manual_seed(number)
        stored = [
            part.detach().float() + 0.3 * torch.randn(len(part), generator=rng).round(decimals=3)
            for part in parts
        ]
        stored = [x.clamp(max=0.0) for x in stored]
        record["response_ids"], record["prompt_ids"] = group.responses, group.prompt
        record["logprobs"] = [x.tolist() for x in stored]
        if record["id"] == "two":
            continue
        advantages = estimator.advantages(record["rewards"])
        drawn = noisy(group, advantages, "7").noise
        assert drawn is not None
        total = torch.zeros((), dtype=torch.float64)
        for part, old, a, b, d in zip(
            parts, stored, advantages, drawn, estimator.divisors(group.lengths), strict=True
        ):
            ratio = torch.exp(part.detach() - old.double())
            clipped = estimator.clipped(ratio, torch.full_like(ratio, a))
            total = total + (part * ratio * ~clipped * b / d).sum()
        wanted[record["id"]] = sketch_gradients(wide, gradients_of(wide, total), spec)
    store = cropi.sketch(
        model, records, tokenizer, noise=True, stage="7", estimator=name, dim=DIM, progress=False,
        behaviour_check="off",
    )  # fmt: skip
    found = sketches_of(store)
    assert found.keys() == wanted.keys()
    reason = {row.id: row.reason for row in store.rows()}["two"]
    assert reason == "two responses: their noise cannot be told from the gradient"
    for key, vector in wanted.items():
        # A float32 pass against float64: 2 layers of sums of at most 128 products.
        assert (found[key].double() - vector).norm() <= 2e-5 * vector.norm(), key


# ------------------------------------------------------------------------------------------- what it says
made_store = partial(in_memory, skipped="zero gradient", trajectories="t", estimator={"name": "cropi"})


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("mean", ["plain", "normalised"])
def test_variances_are_those_of_small_changes(metric: str, mean: str) -> None:
    """The formulas against their definition: move one gradient a little along its noise, and see what the scores do."""
    rng = np.random.default_rng(0)
    train, valid = rng.normal(size=(9, 64)) + 1, rng.normal(size=(8, 64)) + 1
    moved_train, moved_valid = rng.normal(size=(9, 64)), 2 * rng.normal(size=(8, 64))
    moved_valid[2] = 0  # equal responses: no noise, and that is known
    sets = ["x"] * 5 + ["y"] * 3
    stores = made_store(train, "t"), [made_store(valid, "v", sets, trajectories="v")]
    noise = [
        made_store(moved_train, "t", noise=True), made_store(moved_valid[:7], "v", sets, trajectories="v", noise=True)
    ]  # fmt: skip
    found = response_noise(*stores, noise, Influence(metric=metric, mean=mean))
    assert found.sets == ["x", "y"]

    def scores(train: np.ndarray, valid: np.ndarray) -> np.ndarray:
        if mean == "normalised":
            valid = valid / np.linalg.norm(valid, axis=1, keepdims=True)
        means = np.stack([valid[:5].mean(0), valid[5:].mean(0)])
        table = train @ means.T
        if metric == "cosine":
            table = table / np.linalg.norm(train, axis=1)[:, None] / np.linalg.norm(means, axis=1)
        return np.asarray(table)

    step = 1e-4
    wanted = np.zeros((9, 2))
    for i in range(7):
        ends = []
        for sign in (1, -1):
            other = valid.copy()
            other[i] += sign * step * moved_valid[i]
            ends.append(scores(train, other))
        wanted += ((ends[0] - ends[1]) / (2 * step)) ** 2 * ([1, 1] if i < 5 else [1, 3 / 2])
    # Sketches are float32: 2^-24 of numbers near 3, in sums of 64; differences are right to step^2.
    np.testing.assert_allclose(found.valid, wanted, rtol=1e-4)
    own = (scores(train + step * moved_train, valid) - scores(train - step * moved_train, valid)) / (2 * step)
    np.testing.assert_allclose(found.own, own, rtol=1e-4, atol=1e-6)
    share = np.mean(np.sum(moved_train**2, axis=1) / np.sum(train**2, axis=1))
    assert found.share == pytest.approx(share, rel=1e-6)


def test_noise_is_that_of_the_validation_prompts_that_count() -> None:
    """With ``max_valid``: as if there were no others, though the stores of noise hold theirs too."""
    rng = np.random.default_rng(2)
    valid, moved, ids = rng.normal(size=(8, 64)) + 1, rng.normal(size=(8, 64)), [f"v{i}" for i in range(8)]
    train, capped = made_store(rng.normal(size=(5, 64)) + 1, "t"), Influence(max_valid=3, valid_seed=1)

    def found(places: list[int], how: Influence) -> np.ndarray:
        named = [ids[i] for i in places], ["x"] * len(places)
        store = made_store(valid[places], *named, trajectories="v")
        noise = made_store(moved[places], *named, trajectories="v", noise=True)
        return response_noise(train, [store], [noise], how).valid

    everyone = made_store(valid, ids, ["x"] * 8, trajectories="v")
    counted = sorted(int(name[1:]) for _, name in choose_members([everyone], 3, 1)["x"])
    assert len(counted) == 3
    np.testing.assert_allclose(found([*range(8)], capped), found(counted, Influence()), rtol=1e-6)


def test_a_set_without_noise_is_not_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    train, valid = (
        made_store(rng.normal(size=(6, 64)), "t"),
        made_store(rng.normal(size=(4, 64)), "v", ["x"] * 4),
    )
    other = made_store(rng.normal(size=(4, 64)), "w", ["y"] * 4, trajectories="w")
    found = response_noise(
        train, [valid, other], [made_store(np.zeros((4, 64)), "w", ["y"] * 4, trajectories="w", noise=True)]
    )
    assert np.isnan(found.valid[:, 0]).all() and (found.valid[:, 1] == 0).all()
    assert found.own.shape == (0, 2) and np.isnan(found.share)


def test_the_order_of_stores_and_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.ranking.response_noise.MOST", 7)
    rng = np.random.default_rng(3)
    train, valid, moved = (
        rng.normal(size=(12, 64)) + 1,
        rng.normal(size=(4, 64)) + 1,
        rng.normal(size=(12, 64)),
    )

    def found(order: np.ndarray, joined: bool = False) -> tuple[np.ndarray, float]:
        ids = [f"t{i:02d}" for i in order]
        halves = slice(5), slice(5, None)
        files = ["t", "u"] if joined else ["t", "t"]
        noise = [
            made_store(moved[order[half]], ids[half], noise=True, trajectories=file)
            for half, file in zip(halves, files)
        ]
        stores = [
            made_store(train[order[part]], ids[part], trajectories=file)
            for part, file in zip(halves if joined else [slice(None)], files)
        ]
        one = response_noise(SketchStore.join(stores), [made_store(valid, "v", trajectories="v")], noise)
        return one.own, one.share

    # Of files of their own; stores in memory that are read as one have no manifest on a disk.
    first, other = found(np.arange(12)), found(rng.permutation(12), joined=True)
    assert first[0].shape == (7, 1)
    np.testing.assert_array_equal(first[0], other[0])
    assert first[1] == other[1]


# ------------------------------------------------------------------------------- responses, prompts, truth
class Pool:
    """Prompts with responses: s_k = (R_k - p) delta + noise, so that the expected gradient is along delta."""

    def __init__(self, rng: np.random.Generator, dim: int, responses: int, noise: float) -> None:
        self.rng, self.dim, self.responses, self.noise = rng, dim, responses, noise

    def draw(self, deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients and draws of their noise, one of each for a delta."""
        gradients, noises = [], []
        for delta in deltas:
            p = self.rng.uniform(0.15, 0.85)
            while len(set(rewards := (self.rng.random(self.responses) < p).astype(float))) < 2:
                pass
            parts = (rewards - p)[:, None] * delta + self.noise * self.rng.normal(
                size=(self.responses, self.dim)
            )
            advantages = group_advantages(rewards.tolist())
            gradients.append(advantages @ parts / self.responses)
            noises.append(noise_of(advantages, self.rng) @ parts / self.responses)
        return np.array(gradients), np.array(noises)


@pytest.mark.parametrize("responses", [4, 8])
def test_intervals_hold_the_truth_of_prompts_and_responses(responses: int) -> None:
    """90 % intervals of the cosine of the two gradients that infinitely many prompts and responses would give: 85 to
    95 % of them hold it; without the noise of the training prompts' own responses they do not."""
    rng = np.random.default_rng(responses)
    dim, trials, train_size, valid_size = 96, 40, 24, 24
    population = rng.normal(size=dim)
    pool, inside, blind, total = Pool(rng, dim, responses, 0.35), 0, 0, 0
    for _ in range(trials):
        deltas = 0.8 * rng.normal(size=(train_size, dim)) + population
        train, own = pool.draw(deltas)
        valid, others = pool.draw(population + 0.5 * rng.normal(size=(valid_size, dim)))
        stores = made_store(train, "t"), [made_store(valid, "v", trajectories="v")]
        noise = [made_store(own, "t", noise=True), made_store(others, "v", trajectories="v", noise=True)]
        truth = deltas @ population / np.linalg.norm(deltas, axis=1) / np.linalg.norm(population)
        pairs = pairwise(*stores)
        known = response_noise(*stores, noise)
        for given in (known, None):
            low, high = uncertainty(pairs, Influence(draws=2), Selecting(fraction=0.5), noise=given).interval(
                0.9
            )
            held = int(((low[:, 0] <= truth) & (truth <= high[:, 0])).sum())
            inside, blind = (inside + held, blind) if given is not None else (inside, blind + held)
        total += train_size
    assert 0.85 <= inside / total <= 0.95, inside / total
    assert blind / total < 0.7, blind / total


def test_the_part_of_the_responses_is_that_of_drawing_them_anew() -> None:
    """Validation prompts stay, their responses are drawn anew: the spread of the scores is what the noise says."""
    rng = np.random.default_rng(5)
    pool, dim = Pool(rng, 64, 8, 0.3), 64
    population = rng.normal(size=dim)
    deltas = population + 0.5 * rng.normal(size=(30, dim))
    train = rng.normal(size=(20, dim)) + population
    scores, said = [], []
    for _ in range(60):
        valid, others = pool.draw(deltas)
        stores = made_store(train, "t"), [made_store(valid, "v", trajectories="v")]
        scores.append(influence(*stores).table[:, 0])
        noise = [made_store(others, "v", trajectories="v", noise=True)]
        said.append(response_noise(*stores, noise).valid[:, 0])
    # A variance over 60 draws is known to sqrt(2 / 60) = 18 % for one training prompt, better for 20 that share the
    # validation prompts. Drawn pass rates move the lengths of validation gradients too, which no draw of noise has.
    ratio = np.mean(said) / np.var(scores, axis=0, ddof=1).mean()
    assert 0.75 <= ratio <= 1.2, ratio


def test_the_choice_moves_with_the_training_prompts_responses() -> None:
    """Validation prompts that are all one move nothing; the prompts' own noise does."""
    rng = np.random.default_rng(2)
    valid = np.tile(rng.normal(size=64), (4, 1))
    train = np.tile(valid[0], (10, 1)) + 0.1 * rng.normal(size=(10, 64))
    stores = made_store(train, "t"), [made_store(valid, "v", trajectories="v")]
    noise = [made_store(0.3 * rng.normal(size=(10, 64)), "t", noise=True)]
    pairs = pairwise(*stores)
    options = Influence(draws=40), Selecting(fraction=0.3)
    still = uncertainty(pairs, *options)
    moved = uncertainty(pairs, *options, noise=response_noise(*stores, noise))
    assert set(still.p_selected) == {0.0, 1.0} and still.overlap == 1
    assert moved.overlap < 0.9 and 0 < moved.p_selected.min() < moved.p_selected.max() < 1
    assert "and all responses are drawn anew" in str(moved) and "% of their gradients' squared length" in str(
        moved
    )
    # An estimate may lie outside of 0 and 1.
    for signal, said in ((-0.2, " 100% of"), (1.3, " 0% of"), (0.25, " 75% of")):
        assert said in replace(moved, own_signal=signal).responses
    assert moved.sets[0].own > 0 and np.isnan(moved.sets[0].from_responses), (
        "no noise of the validation prompts"
    )
    # More validation prompts do not halve what the training prompts' own responses add.
    both = replace(moved.sets[0], stderr_at_cut=0.5, own=0.4, from_responses=0.2, signal=0.9, prompts=8)
    assert both.advice().endswith(
        "standard error 0.500 at the cut, 0.300 without the noise of the training prompts' responses (0.200 by the "
        "validation prompts' responses alone); 32 prompts would halve 0.300"
    )
    alone = replace(both, own=np.nan)
    assert alone.advice().endswith(
        "(0.200 by the validation prompts' responses alone); 32 prompts would halve it"
    )


# ------------------------------------------------------------------------------------ the ways to get it
@pytest.mark.long
def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``run --noise``, ``sketch --noise`` with ``influence --noise``, and Python say the same."""
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    train = write_lines(tmp_path / "train.jsonl", make_records(20))
    valid = write_lines(tmp_path / "valid.jsonl", make_records(16, seed=1))
    common = ["--model", str(tmp_path / "m"), "--dim", str(DIM), "--no-progress"]
    words = ["run", "--train", str(train), "--valid", str(valid), "--out", str(tmp_path / "out"), *common]
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # which the command writes to standard error
        assert main([*words, "--noise", "--no-report"]) == 0
    said, warned = capsys.readouterr()
    assert warned.count("have no response_ids") == 2, "of each file, and not of its noise again"
    assert (
        "and all responses are drawn anew" in said and "responses     other responses of the training" in said
    )
    assert said.count("parameters    sketched") == 1, "of the model, once, before the noise"
    scores = read_scores(tmp_path / "out" / "scores.parquet")
    found = Uncertainty.of(scores)
    assert found is not None and found.own_signal < 1 and found.sets[0].own > 0
    assert found.sets[0].from_responses > 0
    sketches = tmp_path / "out" / "sketches"
    assert (
        main(["sketch", "--trajectories", str(train), "--out", str(tmp_path / "n"), "--noise", *common]) == 0
    )
    sampled, by_hand = (SketchStore.open(path) for path in (sketches / "noise-train", tmp_path / "n"))
    assert sketches_of(sampled).keys() == sketches_of(by_hand).keys()
    words = ["influence", "--train", str(sketches / "train"), "--valid", str(sketches / "valid")]
    words += [
        "--noise",
        str(tmp_path / "n"),
        str(sketches / "noise-valid"),
        "--out",
        str(tmp_path / "s.parquet"),
    ]
    assert main(words) == 0
    again = Uncertainty.of(read_scores(tmp_path / "s.parquet"))
    assert again is not None and again.sets[0].own == pytest.approx(found.sets[0].own, rel=1e-5)
    assert again.own_signal == pytest.approx(found.own_signal, rel=1e-5)
    here = cropi.score(
        Policy(model, tokenizer),
        make_records(20),
        make_records(16, seed=1),
        noise=True,
        dim=DIM,
        progress=False,
    )
    made = Uncertainty.of(here)
    assert made is not None and made.own_signal == pytest.approx(found.own_signal, rel=1e-4)
    words = ["influence", "--train", str(sketches / "noise-train"), "--valid", str(sketches / "valid")]
    assert main([*words, "--out", str(tmp_path / "x.parquet")]) == 2
    assert "holds the noise of gradients" in capsys.readouterr().err


@pytest.mark.long
def test_shares_of_noise_are_taken_one_by_one_and_merged(tmp_path: Path) -> None:
    """What was sketched with --shard, of a whole store or of merged ones."""
    records, policy = make_records(12), Policy(make_model(), make_tokenizer())
    files = [
        write_lines(tmp_path / name, some)
        for name, some in (("a.jsonl", records[:7]), ("b.jsonl", records[7:]), ("ab.jsonl", records))
    ]

    def stored(name: str, file: Path, noise: bool, shard: tuple[int, int] | None = None) -> SketchStore:
        job = SketchJob(
            [file], tmp_path / name, spec=SketchSpec(1024), noise=noise, shard=shard, tokens_per_batch=24
        )
        made = sketch(policy, job, progress=False).store
        assert made is not None
        return made

    valid = cropi.sketch(policy, make_records(8, seed=1), dim=1024, progress=False)
    whole = stored("whole", files[2], False)
    one = response_noise(whole, [valid], [stored("n", files[2], True)])
    shares = [stored(f"n{i}", files[2], True, (i, 2)) for i in (1, 2)]
    merged = merge(tmp_path / "merged", [stored("a", files[0], False), stored("b", files[1], False)])
    parts = [stored("na", files[0], True), stored("nb", files[1], True)]
    for train, noise in (
        (whole, shares),
        (whole, [merge(tmp_path / "ns", shares)]),
        (merged, parts),
        (merged, [merge(tmp_path / "nm", parts)]),
    ):
        found = response_noise(train, [valid], noise)
        # Stores that were merged have their rows in another order.
        np.testing.assert_allclose(np.sort(found.own, 0), np.sort(one.own, 0), rtol=1e-4, atol=1e-6)
        assert len(found.own) > 5 and found.share == pytest.approx(one.share, rel=1e-5)
    with pytest.raises(CropiError, match="belongs to none of the stores .*trajectories"):
        response_noise(stored("c", files[0], False), [valid], [merge(tmp_path / "nm", parts)])


def test_what_does_not_belong_together_is_refused() -> None:
    rng = np.random.default_rng(3)
    train, valid = (
        made_store(rng.normal(size=(6, 64)), "t"),
        made_store(rng.normal(size=(4, 64)), "v", trajectories="v"),
    )
    noise = made_store(rng.normal(size=(6, 64)), "t", noise=True)
    strange = made_store(rng.normal(size=(6, 64)), "t", noise=True, trajectories="other")
    other = made_store(rng.normal(size=(6, 64)), "t", noise=True, estimator={"name": "ppo"})
    pairs = pairwise(train, [valid])
    known = response_noise(train, [valid], [noise])
    for call, named in (
        (
            lambda: response_noise(train, [valid], [train]),
            "holds gradients; give stores that `cropi sketch --noise`",
        ),
        (lambda: response_noise(train, [valid], [strange]), "belongs to none of the stores.*trajectories"),
        (lambda: response_noise(train, [valid], [other]), "belongs to none of the stores.*estimator.name"),
        (lambda: cropi.influence(noise, valid), "holds the noise of gradients"),
        (lambda: cropi.influence(train, noise), "noise = None in the first, True in the second"),
        (lambda: cropi.influence(train, valid, noise=noise), "noise is .*give a list of SketchStores"),
        (lambda: SketchStore.join([train, noise]), "noise = None in the first"),
        (lambda: uncertainty(pairs, Influence(aggregate="nearest"), noise=known), "aggregate must be mean"),
        (
            lambda: cropi.sketch(make_model(), make_records(2), make_tokenizer(), noise=True, responses=2),
            "noise is drawn from all responses of a prompt and all of their tokens, and responses is 2",
        ),
    ):
        with pytest.raises(CropiError, match=named):
            call()
