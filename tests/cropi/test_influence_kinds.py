"""Influence beyond the mean: the nearest validation prompt, a contrast set, self-influence, one prompt left out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer
from support.stores import in_memory, on_disk

import cropi
from cropi.data.twice import RepeatedPrompts
from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.ranking.influence import SharedPrompts, influence
from cropi.ranking.leave_one_out import leave_one_out
from cropi.ranking.pairwise import pairwise
from cropi.ranking.resampled import NearestSet
from cropi.ranking.resampling import uncertainty
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.ranking.table import read_scores, write_scores
from cropi.ranking.uncertainty import Uncertainty
from cropi.store.codec import DTYPES
from cropi.store.exporting import export
from cropi.store.memory import MemoryStore
from cropi.store.rows import DEFAULT_SET, RowInfo
from cropi.store.store import SketchStore


@pytest.fixture
def stores() -> tuple[MemoryStore, MemoryStore, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    train, valid = torch.randn(30, 24), torch.randn(15, 24)
    train[5] = 0
    return in_memory(train, "t", ["t"] * 30), in_memory(valid, "v", ["x"] * 8 + ["y"] * 7), train, valid


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_nearest_is_the_largest_over_single_prompts(stores: Any, metric: str) -> None:
    train, valid, rows, others = stores
    scores = influence(train, [valid], metric=metric, aggregate="nearest")
    for i in range(30):
        for v, part in enumerate((others[:8], others[8:])):
            products = part.double() @ rows[i].double()
            if metric == "cosine":
                products = products / part.double().norm(dim=1) / rows[i].double().norm()
            if i == 5:
                assert math.isnan(scores.table[i, v])
            else:
                assert scores.table[i, v] == pytest.approx(float(products.max()), abs=1e-5)
    assert scores.meta["aggregate"] == "nearest"
    made = uncertainty(pairwise(train, [valid]), Influence(metric=metric, aggregate="nearest", draws=5))
    np.testing.assert_allclose(made.table, scores.table, atol=2e-5)


def test_standard_error_of_the_nearest_is_the_widened_bootstraps(stores: Any) -> None:
    """The formula against 4000 draws: a variance is known to 2 sqrt(2 / 4000) or so."""
    train, valid, _, _ = stores
    pairs = pairwise(train, [valid])
    usable = np.array([i for i in range(30) if i != 5])
    one = NearestSet(pairs, "x", usable, "cosine")
    rng = np.random.default_rng(0)
    drawn = np.stack([one.score(one.resample(rng)) for _ in range(4000)])
    np.testing.assert_allclose(one.stderr(), math.sqrt(8 / 7) * drawn.std(axis=0), rtol=0.15)


def test_standard_error_and_moves_of_the_nearest_are_those_of_other_prompts() -> None:
    """Normal products with two prompts: the larger has the variance 1 - 1 / pi, the draws (a - b)^2 3 / 16, twice."""
    made = torch.eye(2)
    rows = torch.randn(900, 2, generator=torch.Generator().manual_seed(0))
    pairs = pairwise(in_memory(rows, "t", ["t"] * 900), [in_memory(made, "v", ["x"] * 2)])
    one = NearestSet(pairs, "x", np.arange(900), "dot")
    found = one.stderr()
    apart = (rows[:, 0] - rows[:, 1]).abs().double().numpy()
    np.testing.assert_allclose(found, apart * math.sqrt(3 / 8), rtol=1e-5)
    assert math.sqrt(np.mean(found**2)) == pytest.approx(math.sqrt(1 - 1 / math.pi), rel=0.1)
    every_draw = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(one.moves(every_draw).std(axis=0), found, rtol=1e-5)


def test_draws_look_beyond_the_nearest_that_are_kept(monkeypatch: pytest.MonkeyPatch, stores: Any) -> None:
    monkeypatch.setattr("cropi.ranking.resampled.KEPT", 2)
    pairs = pairwise(stores[0], [stores[1]])
    one = NearestSet(pairs, "x", np.arange(5), "cosine")
    weights = np.zeros(8)
    weights[[3, 6]] = 0.5
    np.testing.assert_array_equal(one.score(weights), one.products[:, [3, 6]].max(axis=1))


@pytest.mark.parametrize("aggregate", ["mean", "nearest"])
def test_a_contrast_set_is_taken_off(stores: Any, aggregate: str) -> None:
    train, valid, _, _ = stores
    plain = influence(train, [valid], aggregate=aggregate)
    less = influence(train, [valid], aggregate=aggregate, minus="y", minus_weight=0.5)
    assert less.sets == ["x"]
    np.testing.assert_allclose(less.table[:, 0], plain.table[:, 0] - 0.5 * plain.table[:, 1], atol=1e-12)
    assert (less.meta["minus"], less.meta["minus_weight"]) == ("y", 0.5)
    pairs, options = pairwise(train, [valid]), Influence(aggregate=aggregate, draws=8)
    whole = uncertainty(pairs, options)
    made = uncertainty(pairs, replace(options, minus="y", minus_weight=0.5))
    np.testing.assert_allclose(made.table, less.table, atol=2e-5)
    expected = np.sqrt(whole.stderr[:, 0] ** 2 + 0.25 * whole.stderr[:, 1] ** 2)
    np.testing.assert_allclose(made.stderr[:, 0], expected)
    assert [one.name for one in made.sets] == ["x"] and set(made.overlap_of_set) == {"x", "y"}


@pytest.mark.parametrize("aggregate", ["mean", "nearest"])
def test_a_validation_prompt_counts_once_and_no_set_is_lost(stores: Any, aggregate: str) -> None:
    train, valid, _, others = stores
    for several in ([valid, valid], [in_memory(others[:8], "v", ["x"] * 8), valid]):
        with pytest.raises(
            CropiError, match="holds the prompt 'v000' of the validation set 'x', and so does"
        ):
            influence(train, several, aggregate=aggregate)
    apart = [in_memory(others[:8], "v", ["x"] * 8), in_memory(others[8:], "v", ["y"] * 7)]
    np.testing.assert_array_equal(
        influence(train, apart, aggregate=aggregate).table,
        influence(train, [valid], aggregate=aggregate).table,
    )
    apart[1] = in_memory(torch.zeros(7, 24), "v", ["y"] * 7)
    with pytest.raises(CropiError, match="validation set 'y' has no usable prompt: 7 were left out"):
        influence(train, apart, aggregate=aggregate)


def test_prompts_on_both_sides_are_warned_of(stores: Any) -> None:
    train, valid, rows, others = stores
    with pytest.warns(
        SharedPrompts, match="^4 training prompts are validation prompts too, for example 't002'"
    ):
        influence(train, [valid, in_memory(rows[2:7], [f"t{i:03d}" for i in range(2, 7)], ["z"] * 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedPrompts)
        influence(train, [in_memory(others, "t", ["x"] * 15)])  # the same names, but other gradients
        short = MemoryStore({"spec": {"dim": 24}})
        # As long a gradient, of other responses.
        short.add(RowInfo("t002", set="z", norm=float(rows[2].norm()), tokens=9), rows[2])
        short.finish()
        influence(train, [short])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_on_both_sides_are_warned_of_though_their_batches_differ(dtype: str) -> None:
    train, valid = make_records(9, seed=0), make_records(3, seed=1)
    model = make_model().to(getattr(torch, dtype))
    with pytest.warns(
        SharedPrompts, match="^3 training prompts are validation prompts too, for example 'p1-000'"
    ):
        cropi.score(model, train + valid, {"v": valid}, make_tokenizer(), dim=4096, progress=False)


@pytest.mark.parametrize("form", ["text", "messages", "ids"])
def test_prompts_on_both_sides_are_found_by_their_text(form: str, recwarn: pytest.WarningsRecorder) -> None:
    """Under other ids, with other responses; and records that say something else are none of them."""
    train, valid = make_records(9, seed=0), make_records(3, seed=1)
    again = valid[1] | {"id": "again", "responses": ["1", "22", "3", "44"], "rewards": [1.0, 0.0, 0.0, 1.0]}
    if form == "messages":
        again["prompt"] = [{"role": "user", "content": again["prompt"] + " "}]
    if form == "ids":
        for one, ids in ((valid[1], [5, 6]), (again, [5, 6]), (train[0], [5])):
            one |= {"prompt": "same", "prompt_ids": ids}
    model, tokenizer = make_model(), make_tokenizer()
    options = {"dim": 4096, "progress": False, "chat_template": "{{ messages[0]['content'] }}"}
    cropi.score(model, train, {"v": valid}, tokenizer, **options)
    assert not [one for one in recwarn if one.category is SharedPrompts]
    with pytest.warns(
        SharedPrompts, match="^1 training prompts are validation prompts too.*'again' and 'p1-001'"
    ):
        cropi.score(model, [*train, again], {"v": valid}, tokenizer, **options)


@pytest.mark.parametrize("form", ["text", "ids"])
def test_prompts_that_a_validation_set_holds_twice_are_named(
    form: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Once, with both counts; not where the other is of another set, says something else or has no gradient."""
    train = make_records(9, seed=0)
    valid = [
        record | ({"prompt": "same", "prompt_ids": [5, i]} if form == "ids" else {})
        for i, record in enumerate(make_records(6, seed=1))
    ]
    other = {"responses": ["1", "22", "3", "44"], "rewards": [1.0, 0.0, 0.0, 1.0]}
    good = [record for record in valid if len(set(record["rewards"])) > 1][:3]
    model, tokenizer = make_model(), make_tokenizer()
    options: dict[str, Any] = {"dim": 4096, "progress": False, "draws": 0}
    again = [record | other | {"id": f"again-{record['id']}"} for record in good]
    flat = again[2] | {"id": "flat", "rewards": [1.0] * 4}
    cropi.score(model, train, {"v": [*good, flat], "w": again}, tokenizer, **options)
    assert not [one for one in recwarn if one.category is RepeatedPrompts]
    cropi.score(model, train, {"v": [*good, *again[:2], flat], "w": again}, tokenizer, **options)
    said = [str(one.message) for one in recwarn if one.category is RepeatedPrompts]
    assert len(said) == 1 and said[0].startswith(
        "validation sets hold prompts more than once: 2 of 5 prompts of 'v' repeat another, for example "
        f"'again-{good[0]['id']}' the text of '{good[0]['id']}'"
    )


def test_prompts_that_a_store_of_validation_prompts_holds_twice_are_named() -> None:
    """Copies were sketched in other batches: two thousandths of their length lie between them."""
    noise = torch.Generator().manual_seed(0)
    rows, other = torch.randn(6, 512, generator=noise), torch.randn(2, 512, generator=noise)
    rows[4:] = rows[:2] + 0.002 * other
    store = in_memory(rows, "v", ["x", "x", "x", "y", "x", "y"])
    with pytest.warns(
        RepeatedPrompts, match="1 of 4 prompts of 'x' repeat another, for example 'v004' the resp.* of 'v000'"
    ):
        cropi.influence(in_memory(rows, "t"), store)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepeatedPrompts)
        rows[4] = 1.02 * rows[0]
        cropi.influence(in_memory(rows, "t"), in_memory(rows, "v", ["x", "x", "x", "y", "x", "y"]))
    told = "1 of 5 rows of 'valid' repeat another, for example '4' the numbers of '0'.*give every row once$"
    with pytest.warns(RepeatedPrompts, match=told):
        cropi.influence(rows, rows[[0, 1, 2, 3, 0]])


def test_demonstrations_of_one_prompt_are_apart(recwarn: pytest.WarningsRecorder) -> None:
    one = [{"id": f"v{i}", "prompt": "Say a number: ", "completion": str(i)} for i in range(8)]
    options: dict[str, Any] = {"estimator": "sft", "dim": 4096, "progress": False, "draws": 0}
    cropi.score(make_model(), one[:4], one[4:], make_tokenizer(), **options)
    assert not [kind for kind in recwarn if kind.category in (RepeatedPrompts, SharedPrompts)]
    again = one[4] | {"id": "again"}
    with pytest.warns(RepeatedPrompts, match="1 of 5 prompts of 'valid' repeat another"):
        cropi.score(make_model(), one[:4], [*one[4:], again], make_tokenizer(), **options)
    with pytest.warns(
        SharedPrompts, match="^1 training prompts are validation prompts too.*'again' and 'v4'"
    ):
        cropi.score(make_model(), [*one[:4], again], one[4:], make_tokenizer(), **options)


def test_what_a_contrast_cannot_be(stores: Any) -> None:
    train, valid, _, others = stores
    with pytest.raises(CropiError, match="there is no validation set 'z'; there are 'x', 'y'"):
        influence(train, [valid], minus="z")
    with pytest.raises(CropiError, match="'x' is the only validation set"):
        influence(train, [in_memory(others[:8], "v", ["x"] * 8)], minus="x")
    with pytest.raises(CropiError, match="minus_weight must be a number above 0"):
        cropi.influence(train, valid, minus="y", minus_weight=0)
    with pytest.raises(CropiError, match="aggregate must be one of mean, nearest"):
        influence(train, [valid], aggregate="max")


def test_kinds_survive_the_score_table_and_the_choice(stores: Any, tmp_path: Path) -> None:
    train, valid, _, _ = stores
    scores = cropi.influence(train, valid, aggregate="nearest", minus="y", draws=10)
    write_scores(tmp_path / "s.parquet", scores)
    back = read_scores(tmp_path / "s.parquet")
    sure = Uncertainty.of(back)
    assert sure is not None and "of the nearest prompt" in str(sure)
    assert select(back, count=3).ids == select(scores, count=3).ids
    assert np.isfinite(back.p_selected).sum() == 29  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_influence_over_checkpoints_is_the_weighted_sum(metric: str, tmp_path: Path) -> None:
    """TracIn's formula, written out in float64; saved, read and chosen from like any other scores."""
    rng, rates = np.random.default_rng(3), [2e-3, 5e-4]
    made, wanted = [], np.zeros((12, 1))
    for t, rate in enumerate(rates):
        train, valid = rng.normal(size=(12, 16)), rng.normal(size=(4, 16)) + 1
        train[t] = 0.0
        stores = on_disk(tmp_path / f"t{t}", train, "t"), on_disk(tmp_path / f"v{t}", valid, "v")
        made.append(influence(stores[0], [stores[1]], metric=metric))
        mean = valid.mean(axis=0)
        with np.errstate(invalid="ignore"):
            lengths = np.linalg.norm(train, axis=1) * np.linalg.norm(mean) if metric == "cosine" else 1.0
            wanted[:, 0] += rate * (train @ mean) / lengths
    wanted[:2] = np.nan
    total = Scores.summed(made, rates)
    np.testing.assert_allclose(total.table, wanted, rtol=1e-5, atol=1e-9)
    total.save(tmp_path / "scores.parquet")
    chosen = Scores.open(tmp_path / "scores.parquet").select(0.25).ids
    assert chosen == [f"t{i:03d}" for i in np.argsort(-wanted[2:, 0])[:3] + 2]
    with pytest.raises(CropiError, match=r"weights are \[0.002\] for 2 score tables"):
        Scores.summed(made, rates[:1])
    with pytest.raises(CropiError, match="scores 1 are of other ids than scores 0"):
        Scores.summed([made[0], replace(made[1], rows=[RowInfo(f"x{i:03d}") for i in range(12)])])
    other = replace(made[1], meta=made[1].meta | {"metric": "other"})
    with pytest.raises(CropiError, match=f"made with metric 'other', and scores 0 with '{metric}'"):
        Scores.summed([made[0], other])
    for wrong in (made[0], [made[0], 1], None):
        with pytest.raises(CropiError, match="give a list of Scores"):
            Scores.summed(wrong)  # type: ignore[arg-type]
    with pytest.raises(CropiError, match=r"weights are \['x', 1\]: give a number"):
        Scores.summed(made, ["x", 1])  # type: ignore[list-item]


def test_self_influence_is_the_squared_length(stores: Any) -> None:
    train, valid, rows, _ = stores
    made = influence(train, [valid]).self_influence
    np.testing.assert_allclose(made, rows.double().square().sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize("mean", ["plain", "normalised"])
def test_one_prompt_left_out_is_a_store_without_it(stores: Any, mean: str) -> None:
    train, valid, _, others = stores
    given = Selecting(count=5)
    whole = select(influence(train, [valid], mean=mean), count=5)
    found = leave_one_out(pairwise(train, [valid]), mean=mean, selecting=given)
    assert len(found) == 15 and [one.kept for one in found] == sorted(one.kept for one in found)
    for one in found:
        place = int(one.id[1:])
        rest = [i for i in range(15) if i != place]
        sets = [("x" if i < 8 else "y") for i in rest]
        scores = influence(train, [in_memory(others[rest], "v", sets)], mean=mean)
        assert one.kept == len(set(select(scores, count=5).ids) & set(whole.ids)) / 5
        column = whole.scores.sets.index(one.set)
        moved = np.nanmax(np.abs(scores.table[:, column] - whole.scores.table[:, column]))
        assert one.moved == pytest.approx(moved, abs=1e-5)
    with pytest.raises(CropiError, match="others do not depend on the validation prompts"):
        leave_one_out(pairwise(train, [valid]), selecting=Selecting(method="random"))
    unnamed = in_memory(others, "v")
    assert {one.set for one in leave_one_out(pairwise(train, [unnamed]), selecting=given)} == {DEFAULT_SET}


@pytest.mark.long
def test_plots_of_large_pools_hold_densities_and_not_a_point_a_prompt(tmp_path: Path) -> None:
    """20,000 points on one panel are a solid block, and 8 panels of them a file of 10 MB."""
    from cropi.ranking.plot import plot_scores

    rng = np.random.default_rng(0)
    sizes = {}
    for n in (2000, 20_000):
        rows = [RowInfo(f"p{i:05d}", pass_rate=float(rng.integers(1, 8) / 8)) for i in range(n)]
        table = rng.normal(0, 0.1, (n, 2))
        scores = Scores(rows, ["x", "y"], table, {"metric": "cosine"}, np.full((n, 2), 0.04), rng.random(n))
        plot_scores(tmp_path / f"{n}.svg", scores, select(scores))
        text = (tmp_path / f"{n}.svg").read_text()
        sizes[n] = len(text)
        assert ("PathCollection" in text) == (n == 2000)
    assert sizes[20_000] < sizes[2000]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_of_a_gradient_changes_no_bit_of_its_cosine(dtype: str) -> None:
    """Rewards may have any size up to 1e30, and some estimators keep it: squares of such sketches leave float32."""
    torch.manual_seed(0)
    vector, other = torch.randn(64), torch.randn(3, 64)
    powers = [0, -100, -45, 45, 100] * 2

    def scores(metric: str, power: int = 0) -> cropi.Scores:
        train, valid = (MemoryStore({"spec": {"dim": 64}, "dtype": dtype}) for _ in range(2))
        for i, p in enumerate(powers):
            train.add(RowInfo(f"t{i}"), torch.from_numpy(np.ldexp(vector.numpy(), p)))
        for i, one in enumerate(other):
            valid.add(RowInfo(f"v{i}", set="x"), torch.from_numpy(np.ldexp(one.numpy(), power)))
        train.finish(), valid.finish()
        return cropi.influence(train, valid, metric=metric)

    whole = scores("cosine")
    table, stderr = whole.table[:, 0], whole.stderr[:, 0]
    assert stderr[0] > 0 and (stderr == stderr[0]).all()
    assert 0.01 < abs(table[0]) < 1 and (table == table[0]).all()
    for power in (-100, 100):
        assert (scores("cosine", power).table[:, 0] == table[0]).all()
        np.testing.assert_allclose(scores("cosine", power).stderr[:, 0], stderr[0], rtol=1e-5)
    dots = scores("dot").table[:, 0]
    assert (dots == np.ldexp(dots[0], powers)).all()


@pytest.mark.long
def test_the_size_of_a_gradient_changes_no_direction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, other = torch.randn(12, 64), torch.randn(2, 64)
    rows[3] = rows[2] + 0.1 * rows[4]  # a near copy

    def found(powers: list[int], power: int, name: str) -> tuple[Any, ...]:
        sized = torch.from_numpy(np.ldexp(rows.numpy(), np.array(powers)[:, None]))
        train = in_memory(sized, "t", ["t"] * 12)
        valid = in_memory(torch.from_numpy(np.ldexp(other.numpy(), power)), "v", ["x"] * 2)
        scores, near = cropi.influence(train, valid), cropi.neighbours(train, valid, 3)
        kept = scores.select(count=6, dedup=0.9)
        export(train, tmp_path / f"{name}.npy", normalise=True)
        spread = [scores.select(count=4, diversity=kind).ids for kind in ("facility", "kmeans")]
        return near, kept.ids, kept.copies, spread, np.load(tmp_path / f"{name}.npy").tolist()

    expected = found([0] * 12, 0, "one")
    assert len(expected[2]) == 1 and expected[0]["v000"][0][0].cosine > 0.1
    assert found([0, -100, -45, 45, 100, 70] * 2, 100, "large") == expected
    assert found([-70, 100, -30, 100, -100, -45] * 2, -100, "small") == expected


def test_the_draw_of_validation_prompts_is_one_for_every_order_of_their_stores() -> None:
    torch.manual_seed(0)
    train, rows = in_memory(torch.randn(8, 64), "t", ["t"] * 8), torch.randn(12, 64)
    one, other = in_memory(rows[:5], "b", ["x"] * 5), in_memory(rows[5:], "a", ["x"] * 7)
    tables = [
        influence(train, stores, max_valid=4).table
        for stores in ([one, other], [other, one], [SketchStore.join([one, other])])
    ]
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], atol=1e-6)
    assert not np.allclose(
        tables[0], influence(train, [one, other], max_valid=4, valid_seed=1).table, atol=1e-2
    )
