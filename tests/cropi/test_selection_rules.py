"""Selection by groups, quotas, bounds, draws, and by what the sketches say: against examples worked out by hand."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.stores import table_of

from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.ranking.draws import draw, normal_scores, soft_weights
from cropi.ranking.rule import Rule
from cropi.ranking.scores import Scores
from cropi.ranking.selection import OtherChoices, check_selecting, select
from cropi.ranking.shares import apportion, read_quotas
from cropi.ranking.values import FROM_SCORES, STRIDE, best_of, fuse_ranks, order_of
from cropi.store.rows import RowInfo


def test_per_file_is_the_rule_of_every_file_by_itself() -> None:
    """The released code's int(N * ratio) of each file: here 3 of 10 and 1 of 6, whatever the scores of the other."""
    values = [*range(10), *range(100, 106)]
    scores = table_of(values, files="a" * 10 + "b" * 6)
    together = select(scores, fraction=0.3)
    assert together.ids == ["15", "14", "13", "12"]
    apart = select(scores, fraction=0.3, per="file")
    assert sorted(apart.ids) == ["07", "08", "09", "15"]
    assert apart.ids[0] == "15"  # equal fused values (1 / rank 1): the higher score first
    # A file's own choice is what the file alone gives.
    alone = select(Scores(scores.rows[:10], scores.sets, scores.table[:10], {}), fraction=0.3)
    assert [name for name in apart.ids if name < "10"] == alone.ids
    assert select(scores, fraction=0.3, per="file").settings == {
        "fraction": 0.3,
        "method": "rrf",
        "per": "file",
    }


def test_a_file_whose_share_is_below_one_prompt_gives_none() -> None:
    scores = table_of(range(12), files="a" * 10 + "b" * 2)
    assert select(scores, fraction=0.3, per="file").ids == ["09", "08", "07"]
    with pytest.raises(CropiError, match="of groups of at most 10 prompts chooses none"):
        select(scores, fraction=0.05, per="file")


def test_count_is_shared_out_by_size_and_what_a_group_lacks_goes_to_the_others() -> None:
    scores = table_of(range(12), tasks="a" * 8 + "b" * 4)
    assert Counter(scores.rows[i].task for i in select(scores, count=6, per="task").chosen) == {
        "a": 4,
        "b": 2,
    }
    table = np.array(range(12), dtype=float)
    table[9:] = np.nan  # one usable prompt is left of task b
    few = select(table_of(table, tasks="a" * 8 + "b" * 4), count=6, per="task")
    assert Counter(few.scores.rows[i].task for i in few.chosen) == {"a": 5, "b": 1}
    # Half of each task is 4 + 2, of which b has 1. A trainer's batch takes more, or the fraction chooses none.
    for fraction, least, given in ((0.5, 5, 5), (0.5, 6, 6), (0.1, 5, 5), (0.5, 20, 9)):
        assert len(select(few.scores, fraction=fraction, per="task", least=least)) == given
    assert len(select(scores, count=5)) == 5
    with pytest.raises(CropiError, match="count 13 is more than the 12 prompts that have a score"):
        select(scores, count=13)


def test_quotas_are_kept_and_the_rest_goes_by_rank() -> None:
    scores = table_of([*range(20)], tasks="a" * 8 + "b" * 6 + "c" * 6)  # c is best, a worst
    assert Counter(scores.rows[i].task for i in select(scores, count=8).chosen) == {"c": 6, "b": 2}
    half = select(scores, count=8, quota=["a=0.5"])
    assert Counter(scores.rows[i].task for i in half.chosen) == {"a": 4, "c": 4}
    two = select(scores, count=8, quota=["a=1", "b=3"])
    assert select(scores, count=8, quota={"a": 0.5}).ids == half.ids  # in Python, as a config's table
    assert select(scores, count=8, quota={"a": 1, "b": np.int64(3)}).ids == two.ids
    assert Counter(scores.rows[i].task for i in two.chosen) == {"a": 1, "b": 3, "c": 4}
    assert {"07", "13", "12", "11"} < set(two.ids)  # the best of each
    none = select(scores, count=8, quota=["c=0"])
    assert Counter(scores.rows[i].task for i in none.chosen) == {"b": 6, "a": 2}
    thirds = select(scores, count=10, quota=["a=0.3", "b=0.3", "c=0.4"])
    assert Counter(scores.rows[i].task for i in thirds.chosen) == {"a": 3, "b": 3, "c": 4}


@pytest.mark.parametrize(
    ("quota", "named"),
    [
        (["d=1"], "there is no task 'd'; .*there are 'a', 'b', 'c'"),
        (
            ["a=0.5,b=0.25"],
            "there is no task 'a=0.5,b'; give one share after another .*, without commas; .*there are",
        ),
        (["a=9"], "'a' is to give 9 prompts, but 8 of it have a gradient"),
        (["a=0.7", "b=0.7"], "the shares add up to 1.4"),
        (["a=7", "b=6"], "the groups get 13 prompts, but 10 are chosen"),
        (["a=1", "b=1", "c=1"], "the groups get 3 of 10 prompts and no other group is left"),
        (["a"], "quota 'a' is not NAME=NUMBER"),
        (["a=1.5"], "is not NAME=NUMBER"),
        (["a=-1"], "is not NAME=NUMBER"),
        (["a=x"], "is not NAME=NUMBER"),
        (["a=1", "a=2"], "names the group 'a' twice"),
    ],
)
def test_quotas_that_do_not_fit_are_errors(quota: list[str], named: str) -> None:
    scores = table_of([*range(20)], tasks="a" * 8 + "b" * 6 + "c" * 6)
    with pytest.raises(CropiError, match=named):
        select(scores, count=10, quota=quota)


@pytest.mark.parametrize("pool", ["all", "usable"])
def test_a_quota_for_a_group_without_a_gradient(pool: str) -> None:
    """Its name was said not to be there."""
    scores = table_of([*range(8)], tasks="aaaabbbb")
    rows = [replace(row, status="ok" if row.task == "a" else "skipped") for row in scores.rows]
    scores = Scores(rows, scores.sets, np.where(np.arange(8)[:, None] < 4, scores.table, np.nan), {})
    few: dict[str, Any] = {"fraction": 0.5, "pool": pool}
    with pytest.raises(CropiError, match="'b' is to give 1 prompts, but 0 of it have a gradient"):
        select(scores, quota=["b=1"], **few)
    with pytest.raises(CropiError, match="there is no task 'c'; there are 'a', 'b'$"):
        select(scores, quota=["c=1"], **few)
    with pytest.raises(CropiError, match="the groups get 1 of . prompts and no other group is left"):
        select(scores, quota=["b=0", "a=1"], **few)
    n = 4 if pool == "all" else 2
    assert len(select(scores, quota=["b=0"], **few)) == n
    assert len(select(scores, quota=["b=0"], least=3, **few)) == max(n, 3)
    groups = {"a": (4, 4), "b": (4, 0)}
    with pytest.raises(CropiError, match="'b' is to give 1 prompts, but 0 of it have a gradient"):
        check_selecting(Selecting(quota=["b=1"], **few), prompts=8, usable=4, groups=groups)


def test_a_count_that_quotas_do_not_leave_is_an_error() -> None:
    scores = table_of([*range(20)], tasks="a" * 8 + "b" * 6 + "c" * 6)
    assert len(select(scores, count=13, quota=["a=1"])) == 13
    with pytest.raises(CropiError, match="count 14 is more than the 13 prompts that the quotas leave"):
        select(scores, count=14, quota=["a=1"])
    assert len(select(scores, fraction=0.7, quota=["a=1"])) == 13  # a fraction chooses so many at most
    more = select(scores, fraction=0.7, quota=["a=1"], least=15)  # but what a trainer's batch needs
    assert Counter(scores.rows[i].task for i in more.chosen) == {"a": 3, "b": 6, "c": 6}
    assert [len(select(scores, fraction=0.7, quota=[q], least=99)) for q in ("a=1", "a=0")] == [20, 12]


def test_names_of_quotas_may_hold_the_equals_sign() -> None:
    assert read_quotas(["a=b=3", "c=1.0"]) == {"a=b": 3, "c": 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_apportionment_adds_up_and_is_off_by_less_than_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {str(i): float(w) for i, w in enumerate(rng.random(rng.integers(1, 9)))}
    n = int(rng.integers(0, 50))
    parts = apportion(n, weights)
    assert sum(parts.values()) == n
    for name, weight in weights.items():
        assert abs(parts[name] - n * weight / sum(weights.values())) < 1
    most = {name: int(rng.integers(0, 9)) for name in weights}
    held = apportion(n, weights, most)
    assert sum(held.values()) == min(n, sum(most.values())) and all(held[k] <= most[k] for k in held)


def test_a_store_without_the_names_of_groups_says_so() -> None:
    with pytest.raises(CropiError, match="the row of '00' does not name the file it came from"):
        select(table_of(range(10)), per="file")
    for given in ({"per": "task"}, {"quota": ["a=3"]}):
        with pytest.raises(CropiError, match="no prompt names its task; name the column .*task=NAME"):
            select(table_of(range(10)), fraction=0.5, **given)  # type: ignore[arg-type]
    left = table_of([np.nan, 1.0, 2.0], tasks="a")  # the one that names a task has no score
    assert select(left, fraction=0.5, per="task").ids == ["02"]


def test_classic_fusion_takes_whole_lists_and_sixty() -> None:
    table = np.array([[9.0, 0.0], [8.0, 8.0], [0.0, 9.0], [1.0, 1.0]])
    # Ranks: a 1, 4; b 2, 2; c 4, 1; d 3, 3. Equal values go by id.
    expected = [1 / 61 + 1 / 64, 2 / 62, 1 / 64 + 1 / 61, 2 / 63]
    np.testing.assert_allclose(fuse_ranks(table, list("abcd"), None, 60.0), expected, rtol=1e-15)
    scores = table_of(table)
    assert select(scores, count=1).ids == ["00"]  # CROPI's: first of one list
    assert select(scores, count=3, method="rrf_classic").ids == ["01", "00", "02"]  # 2/62 > 1/61 + 1/64
    assert select(scores, count=1, method="rrf_classic", rrf_constant=0).ids == ["00"]  # 1/1 + 1/4 > 2/2
    assert select(scores, count=1, method="mean").ids == ["01"]
    far = select(scores, count=4, method="rrf_classic", rrf_constant=1e9)
    assert far.ids[-1] == "03"  # 2 / (1e9 + 3)
    for constant in (-1, 1e300):
        with pytest.raises(CropiError, match="rrf_constant must be from 0 to 1e9"):
            select(scores, method="rrf_classic", rrf_constant=constant)


def test_min_score_leaves_places_empty() -> None:
    scores = table_of([0.1, 0.2, 0.3, 0.4])
    assert select(scores, fraction=1.0, min_score=0.25).ids == ["03", "02"]
    with pytest.raises(CropiError, match="no prompt has so high a score, the highest is 0.4000"):
        select(scores, fraction=1.0, min_score=0.5)
    # The one below the bound, first of the second list, keeps its place there: ranks 1, 3 and 2, 2 of the others.
    two = select(table_of([[0.5, 0.0], [0.1, 0.2], [0.3, 0.1]]), fraction=1.0, min_score=0.25)
    assert two.ids == ["00", "02"]
    np.testing.assert_allclose(two.fused[[0, 2]], [1 + 1 / 3, 1 / 2 + 1 / 2], rtol=1e-15)


def test_confidence_ranks_by_the_lower_bound() -> None:
    """t(0.9) of 8 degrees of freedom is 1.397: 0.50 - 1.397 * 0.2 = 0.22 lies below 0.40 - 1.397 * 0.05 = 0.33."""
    scores = table_of([0.50, 0.40, 0.1], stderr=[0.2, 0.05, 0.0])
    assert select(scores, count=1).ids == ["00"]
    assert select(scores, count=1, confidence=0.9).ids == ["01"]
    assert select(scores, count=1, confidence=0.6).ids == ["00"]  # t is 0.26
    for level in (0.5, 1.0, 0.3):
        with pytest.raises(CropiError, match="confidence must be above 0.5 and below 1"):
            select(scores, confidence=level)
    with pytest.raises(CropiError, match="the scores have no standard errors"):
        select(table_of([1.0, 2.0]), count=1, confidence=0.9)


def test_choice_by_p_selected() -> None:
    """Draws are in proportion, to 4 standard errors of 600."""
    scores = table_of([0.5, 0.4, 0.3], p_selected=[0.2, 0.9, 0.9])
    assert select(scores, count=2, method="p_selected").ids == ["01", "02"]
    with pytest.warns(OtherChoices, match="the chance to be among 2 prompts, and 1 are chosen"):
        drawn = Counter(select(scores, count=1, draw="p_selected", seed=seed).ids[0] for seed in range(600))
    for name, share in (
        ("00", 0.1),
        ("01", 0.45),
        ("02", 0.45),
    ):
        assert abs(drawn[name] / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5
    with pytest.raises(CropiError, match="p_selected: the scores have none"):
        select(table_of([1.0, 2.0]), count=1, method="p_selected")
    halves = table_of([0.4, 0.3, 0.2, 0.1], tasks="aabb", p_selected=[0.9, 0.1, 0.2, 0.8])
    with warnings.catch_warnings():
        # Two are chosen, one of each task, and the chances add up to two.
        warnings.simplefilter("error", OtherChoices)
        assert select(halves, fraction=0.5, per="task", method="p_selected").ids == ["00", "03"]


def test_draws_follow_their_weights() -> None:
    weights = np.array([4.0, 2.0, 1.0, 1.0, 0.0])
    first = Counter(int(draw(weights, seed)[0]) for seed in range(2000))
    for place, weight in enumerate(weights):
        share = weight / weights.sum()
        assert abs(first[place] / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5
    order = draw(weights, 3)
    assert sorted(order) == [0, 1, 2, 3, 4] and order[-1] == 4
    assert (draw(weights, 3) == order).all()


def test_soft_draws_go_from_the_best_to_any() -> None:
    np.testing.assert_allclose(normal_scores(np.array([1, 2, 3]), 3), [0.967422, 0.0, -0.967422], atol=1e-6)
    weights = soft_weights(1000, 0.5)
    assert weights.mean() == pytest.approx(1) and (np.diff(weights) < 0).all()
    scores = table_of(np.arange(100.0))
    best = set(select(scores, count=10).ids)

    def shared(temperature: float) -> float:
        options: dict[str, Any] = {"count": 10, "draw": "soft", "draw_temperature": temperature}
        return float(np.mean([len(best & set(select(scores, seed=s, **options).ids)) for s in range(40)]))

    kept = {temperature: shared(temperature) for temperature in (0.02, 1.0, 100.0)}
    assert kept[0.02] > 9 and 1.5 < kept[1.0] < 7 and kept[100.0] < 2
    one = select(scores, count=10, draw="soft", seed=5)
    assert one.ids == select(scores, count=10, draw="soft", seed=5).ids
    assert one.ids == sorted(one.ids, reverse=True)  # best first, as in every selection


def test_weights_for_all_have_mean_one() -> None:
    chosen = select(table_of([0.1, np.nan, 0.3, 0.2]), count=1)
    weights = chosen.soft_weights()
    assert list(weights) == ["02", "03", "00"] and sum(weights.values()) == pytest.approx(3)
    assert chosen.soft_weights(1e6)["00"] == pytest.approx(1, abs=1e-5)
    # e^(z / temperature) alone would overflow.
    assert chosen.soft_weights(1e-4) == {"02": 3, "03": 0, "00": 0}
    with pytest.raises(CropiError, match="temperature must be a number above 0"):
        chosen.soft_weights(0)


def test_a_lower_bound_is_of_use_where_a_least_score_looks_at_it() -> None:
    assert Selecting(confidence=0.9, method="random", min_score=0.0).confidence == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "draws must be at least 2, or 0 for none, got 1"),
        ({"draws": -1}, "draws must be at least 2, or 0 for none, got -1"),
    ],
)
def test_comparisons_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CropiError, match=message):
        Influence(**options)


def test_a_pool_without_a_usable_prompt_gives_nothing() -> None:
    nothing = table_of(np.full(4, np.nan), tasks="abab")
    for options in ({}, {"method": "random"}, {"draw": "soft"}, {"method": "learnability"}, {"per": "task"}):
        assert select(nothing, fraction=0.5, **options).ids == []  # type: ignore[arg-type]
    with pytest.raises(CropiError, match="the highest is -inf"):
        select(nothing, fraction=0.5, min_score=0.0)
    for per, named in (("pool", "a pool of 0 prompts"), ("task", "groups of at most 0 prompts")):
        with pytest.raises(CropiError, match=named):
            select(nothing, fraction=0.5, pool="usable", per=per)


@pytest.mark.parametrize("kinds", [3, 40, 10**9])
@pytest.mark.parametrize(
    "size, n", [(5, 2), (5, 9), (700, 70), (20_000, 1), (20_000, 1900), (20_000, 15_000)]
)
def test_what_is_chosen_without_sorting_is_what_sorting_chooses(kinds: int, size: int, n: int) -> None:
    """With many equal values, a few, and none; also where values rise with the place, or a sample has the highest."""
    rng = np.random.default_rng(size + n)
    for arranged in ("drawn", "rising", "high in the sample"):
        value = rng.integers(0, kinds, size).astype(np.float64)
        if arranged == "rising":
            value = np.sort(value)
        elif arranged == "high in the sample":
            value[::STRIDE] += kinds
        ties = rng.permutation(size)
        want = order_of(value, np.zeros(size), ties)[:n]
        assert sorted(best_of(value, ties, n).tolist()) == sorted(want.tolist())
        fused = np.zeros(size)
        fused[np.lexsort((ties, -value))[:n]] = 1.0 / np.arange(1, min(n, size) + 1)
        np.testing.assert_array_equal(fuse_ranks(value[:, None], ties, n), fused)


@pytest.mark.parametrize("per", ["pool", "task"])
@pytest.mark.parametrize("method", FROM_SCORES)
def test_columns_counted_in_two_parts_choose_what_the_whole_table_does(method: str, per: str) -> None:
    table = np.random.default_rng(0).standard_normal((60, 3))
    rows = [RowInfo(f"p{i:02d}", task="ab"[i % 5 == 0]) for i in range(60)]
    rule = Rule(rows, np.arange(60), Selecting(fraction=0.2, method=method, per=per))
    whole = rule.choose(table)
    orders, _ = rule.rank(table)
    first = [order[:n] for order, (_, n) in zip(orders, rule.groups, strict=True)]
    assert sorted(whole) == sorted(np.concatenate(first))
    for v in range(3):
        beside = rule.counted(np.delete(table, v, axis=1))
        assert sorted(rule.choose(table[:, [v]], beside)) == sorted(whole)
        assert sorted(rule.choose(table[:, [v]])) != sorted(whole), "the other columns count"


@pytest.mark.parametrize(
    "options, least", [({"fraction": 0.5}, 0), ({"fraction": 0.1}, 9), ({"per": "task"}, 9)]
)
def test_the_cut_of_a_choice_of_all_that_have_a_gradient_is_the_last_of_them(
    options: dict[str, Any], least: int
) -> None:
    """A pool's half, or a batch, may be more prompts than have a gradient: none was at the cut, and its standard error
    was NaN."""
    rows = [RowInfo(f"p{i}", task="a") for i in range(10)]
    rule = Rule(rows, np.arange(3), Selecting(**options), least)
    assert rule.near_the_cut(np.array([[0.3], [0.1], [0.2]]), 0.1).tolist() == [1]
