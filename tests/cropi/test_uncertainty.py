"""Pairwise inner products, neighbours, and the uncertainty of scores and choices, from stores alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stores import on_disk

from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.ranking import redrawn
from cropi.ranking.given import given_stores
from cropi.ranking.influence import influence
from cropi.ranking.pairwise import Pairwise, neighbours, pairwise
from cropi.ranking.resampled import MeanSet
from cropi.ranking.resampling import uncertainty, with_uncertainty
from cropi.ranking.response_noise import ResponseNoise
from cropi.ranking.rule import Rule
from cropi.ranking.selection import select
from cropi.ranking.uncertainty import Uncertainty
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore


def two_stores(folder: Path, train: int, x: int, y: int) -> tuple[SketchStore, SketchStore]:
    """Training and validation prompts with a direction in common, one of each without a gradient."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 24, generator=generator)
    pool = torch.randn(train, 24, generator=generator) + 0.5 * common
    valid = torch.randn(x + y, 24, generator=generator) + common
    pool[5] = valid[3] = 0
    return (
        on_disk(folder / "t", pool, "t", ["train"] * train),
        on_disk(folder / "v", valid, "v", ["x"] * x + ["y"] * y),
    )


@pytest.fixture
def stores(tmp_path: Path) -> tuple[SketchStore, SketchStore]:
    return two_stores(tmp_path, 40, 9, 8)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("mean", ["plain", "normalised"])
def test_scores_from_the_pairs_are_those_of_influence(
    stores: tuple[SketchStore, SketchStore], metric: str, mean: str
) -> None:
    train, valid = stores
    wanted = influence(train, [valid], metric=metric, mean=mean)
    pairs = pairwise(train, [valid])
    assert (pairs.sets, [row.id for row in pairs.rows]) == (wanted.sets, wanted.ids)
    assert len(pairs.valid) == 16, "a validation prompt without a gradient is not a column"
    # Products of 24 float32 numbers against float64 ones.
    bound = 24 * 2**-23 * float(np.nanmax(np.abs(wanted.table))) + 24 * 2**-23
    made = uncertainty(pairs, Influence(metric=metric, mean=mean, draws=4))
    np.testing.assert_allclose(made.table, wanted.table, atol=bound)
    assert np.isnan(made.p_selected[5]) and np.isnan(made.stderr[5]).all()


def test_the_nearest_validation_prompt_instead_of_the_mean(stores: tuple[SketchStore, SketchStore]) -> None:
    train, valid = stores
    pairs = pairwise(train, [valid])
    rows = torch.cat([table for _, table in train.shards()]).double()
    others = torch.cat([table for _, table in valid.shards()]).double()
    cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(others, dim=1).T
    usable = [i for i in range(40) if i != 5]
    np.testing.assert_allclose(pairs.cosines[usable], cosines.numpy(), atol=1e-5)
    got = influence(train, [valid], aggregate="nearest").table[usable]
    np.testing.assert_allclose(got[:, 0], cosines[:, :8].max(dim=1).values.numpy(), atol=1e-5)
    np.testing.assert_allclose(got[:, 1], cosines[:, 8:].max(dim=1).values.numpy(), atol=1e-5)


def test_neighbours_are_the_ends_of_the_whole_order(
    stores: tuple[SketchStore, SketchStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = stores
    pairs = pairwise(train, [valid])
    usable = [i for i in range(40) if i != 5]
    for column, row in enumerate(pairs.valid):
        order = sorted(usable, key=lambda i: (-pairs.cosines[i, column], pairs.rows[i].id))
        helpful, harmful = neighbours(train, [valid], 3, ids=[row.id])[row.id]
        assert [n.id for n in helpful] == [pairs.rows[i].id for i in order[:3]]
        assert [n.id for n in harmful] == [pairs.rows[i].id for i in order[::-1][:3]]
        assert helpful[0].cosine == pytest.approx(pairs.cosines[order[0], column], abs=1e-5)
    assert neighbours(train, valid, 3) == neighbours(train, [valid], 3)
    monkeypatch.setattr("cropi.ranking.pairwise.TOGETHER", 3)
    some = neighbours(train, [valid], 3)
    assert list(some) == [row.id for row in pairs.valid]
    for row in pairs.valid:
        for one, other in zip(some[row.id], neighbours(train, [valid], 3, ids=[row.id])[row.id]):
            assert [n.id for n in one] == [n.id for n in other]
    assert len(neighbours(train, [valid], 100)["v000"][0]) == 39, "no more than there are"


def test_equal_neighbours_are_ordered_by_id(tmp_path: Path) -> None:
    train = on_disk(tmp_path / "t", torch.ones(20, 4), "t", ["t"] * 20)
    valid = on_disk(tmp_path / "v", torch.ones(1, 4), "v", ["x"])
    helpful, harmful = neighbours(train, [valid], 4)["v000"]
    assert [n.id for n in helpful] == [n.id for n in harmful] == ["t000", "t001", "t002", "t003"]


HALF = Selecting(fraction=0.5)


def made_pairs(train: np.ndarray, valid: np.ndarray, sets: list[str]) -> Pairwise:
    rows = [RowInfo(f"t{i:04d}") for i in range(len(train))]
    columns = [RowInfo(f"v{i:03d}", set=name) for i, name in enumerate(sets)]
    return Pairwise(rows, columns, train @ valid.T, np.linalg.norm(train, axis=1), valid @ valid.T)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("mean", ["plain", "normalised"])
def test_standard_errors_are_those_of_the_bootstrap(metric: str, mean: str) -> None:
    """The formula against its definition: draw the validation prompts anew, score, and take the spread."""
    rng = np.random.default_rng(1)
    common = rng.normal(size=32)
    train, valid = rng.normal(size=(12, 32)) + 0.5 * common, rng.normal(size=(60, 32)) + common
    made = uncertainty(
        made_pairs(train, valid, ["x"] * 60), Influence(metric=metric, mean=mean, draws=2), HALF
    )
    if mean == "normalised":
        valid = valid / np.linalg.norm(valid, axis=1, keepdims=True)
    draws = 4000
    drawn = rng.integers(0, 60, (draws, 60))
    means = valid[drawn].mean(axis=1)
    scores = train @ means.T
    if metric == "cosine":
        scores = scores / np.linalg.norm(train, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    spread = scores.std(axis=1) * np.sqrt(60 / 59)
    # The spread of `draws` draws has a relative standard error of 1/sqrt(2 draws) = 0.011; the linearisation, of order
    # 1/n = 0.017. Four of the one and two of the other.
    np.testing.assert_allclose(made.stderr[:, 0], spread, rtol=0.08)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("prompts", [8, 16, 60])
def test_intervals_hold_the_truth(prompts: int, metric: str) -> None:
    """90 % intervals of the cosine (the product) with the known mean gradient of the population: 85 to 95 % of them
    hold it."""
    rng = np.random.default_rng(2)
    dim, trials, inside, total = 64, 60, 0, 0
    population = rng.normal(size=dim)
    for _ in range(trials):
        train = rng.normal(size=(30, dim)) + 0.7 * population
        # Lengths that differ, as those of policy gradients do; 1 on average.
        valid = (rng.normal(size=(prompts, dim)) + population) * rng.gamma(4.0, 0.25, size=(prompts, 1))
        made = uncertainty(made_pairs(train, valid, ["x"] * prompts), Influence(metric=metric, draws=2), HALF)
        low, high = made.interval(0.9)
        truth = train @ population
        if metric == "cosine":
            truth /= np.linalg.norm(train, axis=1) * np.linalg.norm(population)
        inside += int(((low[:, 0] <= truth) & (truth <= high[:, 0])).sum())
        total += 30
    assert 0.85 <= inside / total <= 0.95, inside / total


def test_halves_share_no_prompt() -> None:
    """Of five prompts two are in the first half and three in the second, every one as often as another."""
    rng, pairs = np.random.default_rng(0), made_pairs(np.eye(5), np.eye(5), ["x"] * 5)
    one = MeanSet(pairs, "x", np.arange(5), "dot", "plain")
    first, second = (np.stack(side) for side in zip(*(one.halves(rng) for _ in range(400))))
    assert ((first == 0) | (first == 1 / 2)).all() and ((second == 0) | (second == 1 / 3)).all()
    assert ((first > 0) != (second > 0)).all() and ((first > 0).sum(axis=1) == 2).all()
    assert (np.abs((first > 0).mean(axis=0) - 2 / 5) <= 4 * np.sqrt(6 / 25 / 400)).all()


def test_the_chance_of_being_chosen_by_hand() -> None:
    """One validation prompt along x or y, drawn from two: each of the two leaders is chosen when its axis is drawn
    alone; both axes drawn (half of the draws), the diagonal prompt wins."""
    train = np.array([[1.0, 0.05], [0.05, 1.0], [0.75, 0.74], [-1.0, -1.0]])
    made = uncertainty(
        made_pairs(train, np.eye(2), ["x", "x"]), Influence(draws=2000), Selecting(fraction=0.25)
    )
    # (x, x) 1/4, (y, y) 1/4, mixed 1/2; four standard errors of a share over 2000 draws.
    np.testing.assert_allclose(made.p_selected, [0.25, 0.25, 0.5, 0], atol=4 * np.sqrt(0.25 / 2000))
    assert made.overlap == pytest.approx(made.p_selected[2])
    assert made.halves == 0, "each half is one axis: never the same prompt"
    assert made.sets[0].signal == 0, "orthogonal gradients have no common direction"
    assert "mostly noise" in made.sets[0].advice() and "leave the set out" in made.sets[0].advice()
    assert "leave the set out" not in made.sets[0].advice(only=True)


def chosen_by_hand(table: list[np.ndarray], n: int) -> set[int]:
    """The rule of the paper's code: the n best of every set get 1 / rank, and the n highest sums are chosen."""
    fused = np.zeros(len(table[0]))
    for scores in table:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
        fused[order] += 1.0 / np.arange(1, n + 1)
    # Equal sums go by the highest score.
    best = np.max(table, axis=0)
    return set(sorted(range(len(fused)), key=lambda i: (-fused[i], 0 if fused[i] else -best[i], i))[:n])


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chance_of_being_chosen_is_that_over_all_draws(seed: int) -> None:
    """Three prompts of one set and two of another: 27 x 4 draws with replacement, all as likely."""
    rng = np.random.default_rng(seed)
    train, valid = rng.normal(size=(12, 6)), 0.6 * rng.normal(size=(5, 6)) + rng.normal(size=6)
    counts, tables = np.zeros(12), []
    for own in (valid[:3], valid[3:]):
        mean, size = own.mean(0), np.sqrt(len(own) / (len(own) - 1))
        scores = train @ mean / np.linalg.norm(train, axis=1) / np.linalg.norm(mean)
        moves = []
        for places in itertools.product(range(len(own)), repeat=len(own)):
            drawn = own[list(places)].mean(0)
            across = drawn - drawn @ mean / (mean @ mean) * mean
            moves.append(size * train @ across / np.linalg.norm(train, axis=1) / np.linalg.norm(mean))
        kept = max(1 - np.mean([move.var(ddof=1) for move in moves]) / scores.var(ddof=1), 0)
        tables.append(
            [scores.mean() + kept * (scores - scores.mean()) + np.sqrt(1 + kept) * m for m in moves]
        )
    for pair in itertools.product(*tables):
        counts[list(chosen_by_hand(list(pair), 3))] += 1 / (27 * 4)
    made = uncertainty(
        made_pairs(train, valid, ["x"] * 3 + ["y"] * 2), Influence(draws=4000), Selecting(fraction=0.25)
    )
    # Four standard deviations of a share of the draws, and twice as many: the noise's size is drawn too.
    bound = 8 * np.sqrt((counts * (1 - counts)).clip(0) / 4000) + 1e-12
    assert (np.abs(made.p_selected - counts) <= bound).all(), np.abs(made.p_selected - counts) / bound
    base = chosen_by_hand([np.array(column) for column in made.table.T], 3)
    assert made.overlap == pytest.approx(made.p_selected[list(base)].mean())
    assert 0 < made.overlap < 1


@pytest.mark.long
@pytest.mark.parametrize(("prompts", "sets", "noise"), [(6, 1, 0), (16, 1, 0), (16, 3, 0), (16, 1, 0.6)])
def test_so_many_of_the_chosen_are_chosen_by_other_validation_prompts(
    prompts: int, sets: int, noise: float
) -> None:
    """Against its definition: draw validation prompts (and the noise of the training prompts' responses) from the
    population twice, choose, and see how many stay."""
    rng = np.random.default_rng(5)
    dim, pool, trials = 60, 200, 60
    names = [f"s{i // prompts}" for i in range(sets * prompts)]
    off, p, again = [], [], []
    for _ in range(trials):
        means = rng.normal(size=(sets, dim)) / np.sqrt(dim)
        train = rng.normal(size=(pool, dim)) / np.sqrt(dim)
        train += 0.15 * rng.normal(size=(pool, sets)) @ (means / np.linalg.norm(means, axis=1, keepdims=True))

        def sampled(means: np.ndarray, train: np.ndarray, draws: int) -> Uncertainty:
            valid = np.repeat(means, prompts, axis=0) + rng.normal(size=(len(names), dim)) / np.sqrt(dim)
            own, other = noise * rng.normal(size=(2, pool, dim)) / np.sqrt(dim)
            train, mean = train + own, valid.mean(axis=0)
            lengths = np.linalg.norm(train, axis=1)
            other -= train * ((train * other).sum(axis=1) / lengths**2)[:, None]
            moves = (other @ mean / lengths / np.linalg.norm(mean))[:, None]
            known = ResponseNoise(["s0"], np.zeros((pool, 1)), moves, 0.5) if noise else None
            return uncertainty(made_pairs(train, valid, names), Influence(draws=draws), noise=known)

        made, other = sampled(means, train, 60), sampled(means, train, 2)
        first, second = (chosen_by_hand(list(one.table.T), pool // 10) for one in (made, other))
        off.append(made.overlap - len(first & second) / len(first))
        p.append(made.p_selected)
        again.append(np.isin(np.arange(pool), list(second)))
    # Draws with replacement from one sample agree by 0.05 (16 prompts) or 0.09 (6 prompts) more than two samples do.
    error = np.std(off, ddof=1) / np.sqrt(trials)
    assert error < 0.015
    assert abs(np.mean(off)) < 3 * error, np.mean(off)
    chance, chosen = np.concatenate(p), np.concatenate(again)
    for low, high in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        some = (low <= chance) & (chance < high)
        told = chance[some].mean()
        # Prompts of one trial move together: their shares vary more than those of independent ones.
        bound = 4 * np.sqrt(2 * told * (1 - told) / some.sum())
        assert chosen[some].mean() == pytest.approx(told, abs=bound), (low, bound)


@pytest.mark.parametrize("aggregate", ["mean", "nearest"])
def test_of_equal_prompts_the_first_by_id_is_chosen_in_every_draw(aggregate: str) -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(12, 32))[rng.integers(0, 12, 99)].astype(np.float32)
    valid = (rng.normal(size=(18, 32)) + 0.4).astype(np.float32)
    pairs = made_pairs(train, valid, ["x"] * 18)
    # Products of equal rows by a matrix product differ in their last bits; those of a store do not.
    first, place = np.unique(train, axis=0, return_index=True, return_inverse=True)[1:]
    pairs.dots[:], pairs.norms[:] = pairs.dots[first[place]], pairs.norms[first[place]]
    made = uncertainty(pairs, Influence(aggregate=aggregate, draws=40), Selecting(fraction=0.2))
    for kind in range(len(first)):
        equal = place == kind
        assert len(np.unique(made.table[equal])) == len(np.unique(made.stderr[equal])) == 1
        assert (np.diff(made.p_selected[equal]) <= 0).all()


def test_validation_prompts_that_cancel() -> None:
    """A half, or a draw, whose mean gradient is zero has no direction: all prompts are equal, and none is NaN."""
    valid = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0.5]])
    train = np.random.default_rng(0).normal(size=(10, 3))
    made = uncertainty(made_pairs(train, valid, ["x"] * 4), Influence(draws=40), Selecting(fraction=0.2))
    assert np.isfinite(made.p_selected).all() and made.p_selected.sum() == pytest.approx(2)
    assert 0 <= made.halves <= 1


def test_a_choice_that_nothing_can_move() -> None:
    rng = np.random.default_rng(3)
    valid = np.array([5.0, 0, 0, 0]) + 0.01 * rng.normal(size=(12, 4))
    train = np.concatenate([np.tile([1.0, 0, 0, 0], (5, 1)), -np.tile([1.0, 0, 0, 0], (5, 1))])
    train += 0.01 * rng.normal(size=train.shape)
    made = uncertainty(made_pairs(train, valid, ["a"] * 6 + ["b"] * 6), Influence(draws=50), HALF)
    assert made.p_selected.tolist() == [1.0] * 5 + [0.0] * 5
    assert made.overlap == made.halves == 1 and made.overlap_of_set == {"a": 1.0, "b": 1.0}
    assert all(one.signal > 0.99 and one.prompts == 6 for one in made.sets)
    assert "24 prompts would halve it" in str(made)


def test_the_choice_is_that_of_select(stores: tuple[SketchStore, SketchStore]) -> None:
    """Without noise (every validation prompt the same) every draw must choose what ``select`` chooses."""
    train, _ = stores
    folder = train.path.parent
    valid = on_disk(folder / "w", torch.ones(6, 24), "v", ["x"] * 3 + ["y"] * 3)
    scores = influence(train, [valid])
    for method in ("rrf", "max"):
        made = uncertainty(
            pairwise(train, [valid]), Influence(draws=3), given := Selecting(fraction=0.2, method=method)
        )
        chosen = set(select(scores, given).chosen)
        assert {i for i, p in enumerate(made.p_selected) if p == 1} == chosen


def test_the_same_stores_give_the_same_numbers(stores: tuple[SketchStore, SketchStore]) -> None:
    pairs = pairwise(stores[0], [stores[1]])
    one, same = (uncertainty(pairs, Influence(draws=20)) for _ in range(2))
    np.testing.assert_array_equal(one.p_selected, same.p_selected)


@pytest.mark.parametrize("method", ["rrf", "max"])
def test_numbers_do_not_depend_on_the_number_of_threads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    pairs = made_pairs(rng.normal(size=(200, 12)), rng.normal(size=(18, 12)), list("aaaaaabbbbbbcccccc"))
    noise = ResponseNoise(
        ["a", "b", "c"], np.abs(rng.normal(size=(200, 3))), 0.1 * rng.normal(size=(50, 3)), 0.2
    )
    found = []
    monkeypatch.setattr(redrawn, "MOST_SCORES", 600 * 5)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(uncertainty(pairs, Influence(draws=12), Selecting(method=method), noise=noise))
    one, several = found
    np.testing.assert_array_equal(one.p_selected, several.p_selected)
    assert (one.overlap, one.overlap_of_set, one.halves) == (
        several.overlap,
        several.overlap_of_set,
        several.halves,
    )


@pytest.mark.parametrize("aggregate", ["mean", "nearest"])
def test_numbers_do_not_depend_on_the_number_of_draws_in_memory(
    aggregate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large pool, a draw or two are in memory together; the noise is that of many all the same."""
    rng = np.random.default_rng(7)
    # Noise in one direction: a single draw tells little of it.
    train, valid = (
        rng.normal(size=(90, 4)),
        np.array([1.0, 0.5, 0, 0]) + rng.normal(size=(18, 1)) * [0, 0, 2, 0],
    )
    pairs, found = made_pairs(train, valid, list("aaaaaabbbbbbcccccc")), []
    for together in (redrawn.TELLING, 1, 5):
        monkeypatch.setattr(redrawn, "MOST_SCORES", 3 * 90 * together)
        made = uncertainty(
            pairs, Influence(aggregate=aggregate, draws=redrawn.TELLING), Selecting(fraction=0.2)
        )
        found.append((made.p_selected.tolist(), made.overlap_of_set))
    assert found[1] == found[0] and found[2] == found[0]


def test_columns_that_are_ranked_grow_with_the_sets_as_draws_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set drawn alone stands beside the ranks of all others, which are not counted anew for each."""
    counts, counted = list[int](), Rule.counted

    def noted(rule: Rule, table: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
        counts[-1] += table.shape[1]
        return counted(rule, table, beside)

    monkeypatch.setattr(Rule, "counted", noted)
    rng = np.random.default_rng(6)
    for sets in (20, 40):
        counts.append(0)
        names = [f"{v:02d}" for v in range(sets) for _ in range(2)]
        uncertainty(
            made_pairs(rng.normal(size=(40, 8)), rng.normal(size=(2 * sets, 8)), names), Influence(draws=2)
        )
    assert counts[1] < 2.1 * counts[0]


def test_a_set_of_one_prompt_has_no_estimate() -> None:
    """All of the chosen prompts seemed to stay chosen: nothing moves the scores of one prompt."""
    rng = np.random.default_rng(4)
    train, valid = rng.normal(size=(10, 6)), rng.normal(size=(4, 6))
    with pytest.raises(CropiError, match="validation set 'b' has 1 prompt, so that nothing shows how others"):
        uncertainty(made_pairs(train, valid, ["a"] * 3 + ["b"]), Influence(draws=5))
    pool, sides = given_stores(train, {"a": valid[:3], "b": valid[3:]})
    scores = with_uncertainty(influence(pool, sides), pool, sides, Influence(), Selecting())
    assert scores.stderr is None and Uncertainty.of(scores) is None
    for options in ({"confidence": 0.9}, {"method": "p_selected"}):
        with pytest.raises(
            CropiError, match="the validation set 'b' has 1 prompt.*two validation prompts a set"
        ):
            scores.select(0.2, **options)


@pytest.mark.parametrize("prompts", [2, 5])
@pytest.mark.parametrize("signal", [True, False])
def test_few_prompts_are_said_to_tell_little(prompts: int, signal: bool) -> None:
    """docs/trust.md has how far off the shares are, most of all where there is little signal."""
    rng = np.random.default_rng(4)
    valid = rng.normal(size=(prompts, 6)) + 2 if signal else np.eye(6)[:prompts]
    made = uncertainty(made_pairs(rng.normal(size=(10, 6)), valid, ["a"] * prompts), Influence(draws=5))
    assert ("mostly noise" in str(made)) != signal
    assert ("fewer prompts stay chosen than is said here" in str(made)) == (prompts < 5)


def test_mistakes(stores: tuple[SketchStore, SketchStore], tmp_path: Path) -> None:
    train, valid = stores
    pairs = pairwise(train, [valid])
    other = on_disk(tmp_path / "o", torch.ones(2, 24), "v", ["x"] * 2, stage="1")
    empty = on_disk(tmp_path / "e", torch.zeros(2, 24), "v", ["x"] * 2)
    for call, named in (
        (lambda: pairwise(train, []), "valid is empty"),
        (lambda: pairwise(train, [other]), "stage"),
        (lambda: pairwise(train, [empty]), "validation set 'x' has no usable prompt: 2 were left out"),
        (lambda: neighbours(train, [valid], 0), "k must be an integer of at least 1, got 0"),
        (lambda: neighbours(train, [valid], ids=["v003"]), "'v003' is not a usable validation prompt"),
        (
            lambda: uncertainty(pairs, selecting=Selecting(method="random")),
            "method must be one of rrf, rrf_classic, max, mean, got 'random'",
        ),
        (lambda: uncertainty(pairs, Influence(draws=0)), "draws must be at least 2, got 0"),
        (lambda: uncertainty(pairs, selecting=Selecting(fraction=0.001)), "chooses none"),
        (lambda: uncertainty(pairs, Influence(draws=2)).interval(90), r"level must be in \(0, 1\), got 90"),
        (
            lambda: uncertainty(pairs, Influence(draws=2, minus="y")).interval(),
            "differences of cosines .minus 'y'.",
        ),
    ):
        with pytest.raises(CropiError, match=named):
            call()
