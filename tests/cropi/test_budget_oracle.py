"""Scoring within a budget, worked out anew: every draw of responses and tokens, and how uncertain a choice is."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr

from cropi.data.readers import read
from cropi.gradient.batches import make_batches
from cropi.gradient.estimators import make_estimator
from cropi.gradient.layout import Layout
from cropi.gradient.subset import Subset, inclusion
from cropi.gradient.tokenize import TokenGroup
from cropi.options import Selecting
from cropi.ranking.cut import EXPLORE, Drift, _chosen, anew, expected, spreads
from cropi.ranking.rule import Rule
from cropi.store.rows import RowInfo

RESPONSES = {
    "all different": [[7, 8, 9], [10, 11], [12, 13, 14, 15], [16]],
    "two are one": [[7, 8, 9], [7, 8, 9], [12, 13, 14, 15], [16, 17]],
}
REWARDS = [1.0, 0.0, 0.25, 0.5]


def group_of(responses: list[list[int]]) -> TokenGroup:
    record = {"id": "a", "prompt_ids": [5, 6], "rewards": REWARDS, "response_ids": responses}
    group = next(iter(read([record])))
    assert group.response_ids is not None
    return TokenGroup(group, [5, 6], group.response_ids, None, 1.0, None)


class Script:
    """In the place of a generator: an order and a start of a systematic draw, and which tokens are drawn."""

    def __init__(self, order: Any = (), start: float = 0.0, tokens: Any = ()) -> None:
        self.order, self.start, self.tokens = np.array(order), start, iter(tokens)

    def permutation(self, count: int) -> np.ndarray:
        assert sorted(self.order) == list(range(count))
        return self.order

    def random(self) -> float:
        return self.start

    def choice(self, count: int, size: int, replace: bool) -> np.ndarray:
        chosen = np.array(next(self.tokens))
        assert len(chosen) == size and not replace and set(chosen.tolist()) <= set(range(count))
        return chosen


def draws_of_responses(probabilities: np.ndarray) -> Iterator[tuple[float, Script]]:
    """Every draw: all orders are equally likely, and between two neighbouring ends every start gives the same."""
    orders = list(itertools.permutations(range(len(probabilities))))
    for order in orders:
        ends = sorted(
            {0.0, 1.0, *(float(end) % 1.0 for end in np.cumsum(probabilities[list(order)]).round(12))}
        )
        for low, high in itertools.pairwise(ends):
            yield (high - low) / len(orders), Script(order, (low + high) / 2)


def weights(group: TokenGroup, estimator: Any) -> dict[int, float]:
    """By token (each stands in one response, or in equal ones): the factor of its log-prob's gradient."""
    made: dict[int, float] = defaultdict(float)
    for batch in make_batches([group], estimator, Layout(shared=False)):
        factor = batch.advantages.double() / batch.divisors.double()
        for token, value in zip(batch.targets.tolist(), factor.reshape(len(factor), -1).sum(1).tolist()):
            made[token] += value
    return made


@pytest.mark.long
@pytest.mark.parametrize("name", ["cropi", "dapo", "rloo"])
@pytest.mark.parametrize("responses", RESPONSES)
@pytest.mark.parametrize(
    "few", [{"responses": 1}, {"responses": 2}, {"tokens": 0.5}, {"responses": 2, "tokens": 0.6}]
)
def test_every_draw_together_gives_the_full_gradient(
    name: str, responses: str, few: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all draws, each as often as it comes, of every token's weight; never more responses than asked."""
    group, estimator = group_of(RESPONSES[responses]), make_estimator(name)
    full, mean, total = weights(group, estimator), defaultdict(float), 0.0
    firsts = [members[0] for members in group.equal]
    parts = np.abs(estimator.advantages(REWARDS)) / estimator.divisors(group.lengths) * np.sqrt(group.lengths)
    sizes = np.array([parts[list(members)].sum() for members in group.equal])
    n = few.get("responses")
    outer = [(1.0, Script())] if n is None else list(draws_of_responses(inclusion(sizes, n)))
    for chance, script in outer:
        scripts = {"": script}
        monkeypatch.setattr(Subset, "_draws", lambda self, group, what, given=scripts: given[what])
        some = Subset(responses=n).of(group, estimator)
        kept = firsts if some.kept is None else sorted(some.kept)
        assert n is None or len(kept) == n
        choices = [
            list(
                itertools.combinations(
                    range(group.lengths[k]), math.ceil(few.get("tokens", 1.0) * group.lengths[k])
                )
            )
            for k in kept
        ]
        combined = list(itertools.product(*choices)) if "tokens" in few else [()]
        for tokens in combined:
            scripts[":tokens"] = Script(tokens=tokens)
            for token, value in weights(Subset(**few).of(group, estimator), estimator).items():
                mean[token] += chance / len(combined) * value
        total += chance
    assert total == pytest.approx(1.0, abs=1e-12)
    # Weights are float32, those of equal responses one by one; in a draw they are larger by the inverse of a chance.
    largest = float(np.abs(estimator.advantages(REWARDS) / estimator.divisors(group.lengths)).max())
    scale = len(REWARDS) * largest / (1.0 if n is None else inclusion(sizes, n)[sizes > 0].min())
    for token, value in full.items():
        assert mean[token] == pytest.approx(value, abs=2.0**-24 * scale), token
    assert any(full.values()) and mean.keys() == {
        token for token, value in full.items() if value or n is None
    }


# ------------------------------------------------------------------------------------------------ which prompts
IDS = [f"p{i}" for i in range(8)]
# One is far ahead, three are near each other and of several ages, one was never sketched, the others are far behind.
TABLE = np.array([[3.0], [1.0], [1.3], [0.8], [-9.0], [math.nan], [-12.0], [-15.0]])
AGES = np.array([1.0, 1.0, 4.0, 9.0, 1.0, 0.0, 1.0, 1.0])
RATES = np.array([0.9, 0.5, 0.5, 0.6, 0.3, 0.75, 0.1, 0.25])


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Height and slope, by least squares over the points and ten observations that the slope is 0."""
    rows = np.vstack([np.stack([np.ones_like(x), x], axis=1), [[0.0, 1.0]] * 10])
    height, slope = np.linalg.lstsq(rows, np.append(y, [0.0] * 10), rcond=None)[0]
    return float(height), float(slope)


def before_a_sketch(scores: np.ndarray, rates: np.ndarray, rate: float) -> tuple[float, float]:
    """Mean and standard deviation of the score of a prompt with one pass rate, from scores and pass rates of others."""
    m, nearest = len(scores), min(max(rate, rates.min()), rates.max())
    if rates.min() == rates.max():
        return float(scores.mean()), float(scores.std(ddof=1))
    x = (np.append(rates, nearest) - rates.mean()) / rates.std()
    height, slope = line(x[:-1], scores)
    squares = (scores - height - slope * x[:-1]) ** 2
    level = squares.sum() / (m - 1)
    variance = level + line(x[:-1], squares)[1] * x[-1]
    return height + slope * float(x[-1]), math.sqrt(min(max(variance, level / 4), 4 * level))


def chance_of_the_two_best(
    table: np.ndarray, ages: np.ndarray, rates: np.ndarray, variance: float
) -> np.ndarray:
    """P(a prompt's moved score is among the two highest), by quadrature over its own score."""
    known = np.isfinite(table[:, 0])
    spread = table[known, 0].std(ddof=1)
    priors = [before_a_sketch(table[known, 0], rates[known], rate) for rate in rates]
    centre = np.where(known, table[:, 0], [mean for mean, _ in priors])
    moved = np.where(known, np.sqrt(ages * variance) * spread, [deviation for _, deviation in priors])
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    chances = []
    for i in range(len(centre)):
        below = [
            ndtr((centre[i] + moved[i] * z - centre[j]) / moved[j]) for j in range(len(centre)) if j != i
        ]
        none = np.prod(below, axis=0)
        one = sum(
            (1 - b) * np.prod([other for k, other in enumerate(below) if k != j], axis=0)
            for j, b in enumerate(below)
        )
        chances.append(float(((none + one) * density).sum()))
    return np.array(chances)


@pytest.mark.parametrize("m", [1, 2, 3, 50])
def test_what_a_score_is_before_the_sketch(m: int) -> None:
    """Against augmented least squares, set by set; a rate beyond those that were seen counts as the nearest of them."""
    rng = np.random.default_rng(m)
    rates = np.concatenate([rng.integers(2, 7, m) / 8, [0.0, 0.3, 0.5, 1.0]])
    table = rates[:, None] * ([1.0, -3.0, 0.0] + rng.standard_normal((len(rates), 3)))
    table[m:, 1] = math.nan
    centre, spread = expected(table, rates)
    for v in range(3) if m > 1 else []:
        want = np.array([before_a_sketch(table[:m, v], rates[:m], rate) for rate in rates])
        # Sums of at most 60 products of numbers below 10, and their roots.
        np.testing.assert_allclose(np.stack([centre[:, v], spread[:, v]], axis=1), want, rtol=0, atol=1e-12)
    if m == 1:
        np.testing.assert_array_equal(centre, np.broadcast_to(table[0], centre.shape))
        np.testing.assert_array_equal(spread, np.zeros_like(spread))
    alike = expected(table, np.full(len(rates), 0.1))
    np.testing.assert_allclose(alike[0], np.broadcast_to(table[:m].mean(axis=0), centre.shape), atol=1e-14)
    np.testing.assert_allclose(alike[1], np.broadcast_to(spreads(table), spread.shape), atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("rates", [np.zeros(8), RATES], ids=["equal rates", "rates"])
def test_how_uncertain_a_choice_is_and_what_is_taken_for_it(rates: np.ndarray) -> None:
    rows = [RowInfo(name, pass_rate=rate) for name, rate in zip(IDS, rates.tolist(), strict=True)]
    rule, drift = Rule(rows, np.arange(8), Selecting(count=2)), Drift(0.5, 990)
    variance = (0.5 + 10 * 0.25) / 1000
    want = chance_of_the_two_best(TABLE, AGES, rates, variance)
    assert want.sum() == pytest.approx(2, abs=1e-6)
    seeds = range(50)
    got = np.mean([_chosen(TABLE, AGES, rule, drift, seed) for seed in seeds], axis=0)
    # 200 draws each; four standard deviations of a share of all of them.
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / (200 * 50)) + 1e-9).all(), (got, want)
    value = want * (1 - want)
    first = np.zeros(8)
    for seed in seeds:
        places = anew(TABLE, AGES, np.ones(8), IDS, rule, tokens=5.0, drift=drift, seed=seed)
        explored = places[: round(EXPLORE * 5)]
        first[explored] += 1
        rest = [i for i in np.argsort(-value).tolist() if i not in explored]
        # Those whose p (1 - p) differ by more than the draws' noise come in its order.
        for a, b in itertools.pairwise(places[len(explored) :]):
            assert value[a] >= value[b] - 4 * 0.5 / math.sqrt(200)
        assert set(places[len(explored) :]) >= {i for i in rest[:3] if value[i] > 0.1}
    assert first.sum() == 50 and (first > 0).sum() >= 6
    assert spreads(TABLE)[0] == pytest.approx(TABLE[np.isfinite(TABLE)].std(ddof=1))
