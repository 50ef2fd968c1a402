"""Which prompts of a pool to score anew where there is no time for all: those of which it is uncertain whether they are
chosen, and some at random.

A score from an earlier sketch of the prompt is off by what training has changed since. It is taken for a random walk:
with a sketch that is ``a`` stages old the score for set v has the variance ``a r^2 sd_v^2``, sd_v the standard
deviation of the scores for v over the pool. r^2 is measured where prompts were scored anew, as the mean of

    (new score - score from the earlier sketch)^2 / (a sd_v^2),

to which ten observations of :data:`DRIFT`^2 are added beforehand. The rule of the selection then runs on :data:`DRAWS`
tables. In each of them normal numbers of these variances are added to all scores, and a prompt without a sketch gets a
score with the mean and the variance that prompts of its pass rate have (:func:`expected`). p is the share of the tables
in which a prompt is chosen. p (1 - p), the variance of being chosen, is largest at the cut and for prompts whose scores
are least certain.

With T tokens, prompts are taken in a random order until :data:`EXPLORE` T are spent, so that r^2 is measured on all
kinds of prompts and what the random walk does not foresee is found; then in the order of p (1 - p), the largest first,
until T are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cropi.ranking.rule import Rule
from cropi.ranking.values import drawn_ties

DRAWS = 200
EXPLORE = 0.2
DRIFT, VISITS = 0.5, 10
ALIKE = 10
NARROWEST, WIDEST = 0.25, 4.0


@dataclass(frozen=True)
class Drift:
    """How far scores move in a stage: the sum of the squares that were seen, and their number.

    >>> Drift().variance
    0.25
    """

    total: float = 0.0
    count: int = 0

    @property
    def variance(self) -> float:
        """r^2, see above."""
        return (self.total + VISITS * DRIFT**2) / (self.count + VISITS)

    def seen(self, before: np.ndarray, after: np.ndarray, ages: np.ndarray, spread: np.ndarray) -> Drift:
        """The drift that includes prompts that were scored anew.

        Args:
            before, after: float64 ``[n, sets]``, scores by the earlier and the new sketches; NaN without a sketch.
            ages: of the earlier sketches, in stages, ``[n]``.
            spread: sd_v, ``[sets]``.
        """
        squares = np.square((after - before) / np.where(spread > 0, spread, np.nan)) / ages[:, None]
        squares = squares[np.isfinite(squares)]
        return Drift(self.total + float(squares.sum()), self.count + squares.size)


def spreads(table: np.ndarray) -> np.ndarray:
    """sd_v of every set, over the prompts that have a score; 0 where fewer than two have one."""
    known = table[np.isfinite(table).all(axis=1)]
    return known.std(axis=0, ddof=1) if len(known) > 1 else np.zeros(table.shape[1])


def expected(table: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the score of a prompt is before it is sketched, by its pass rate: mean and standard deviation ``[n, sets]``.

    Of the m prompts with scores s_iv, let mean_v be the mean score, x_i the pass rate in standard deviations from its
    mean, and e_iv = s_iv - mean_v - a_v x_i. The mean at x is mean_v + a_v x, and the variance

        sum_i e_iv^2 / (m - 1) + b_v x,  within 1/4 and 4 times its first term,

    where ``a_v = sum_i x_i s_iv / (m + 10)`` and ``b_v = sum_i x_i e_iv^2 / (m + 10)`` are slopes of least squares,
    after ten observations of a slope of 0. A pass rate outside those of the prompts with a score counts as the nearest
    of theirs. Where these are all equal, the mean is mean_v and the standard deviation sd_v.

    Args:
        table: float64 ``[n, sets]``, scores; NaN for prompts without one. At least one has a score.
        rates: pass rates, ``[n]``.
    """
    known = np.isfinite(table).all(axis=1)
    scores, seen = table[known], rates[known]
    m, apart = len(scores), rates.clip(seen.min(), seen.max()) - seen.mean()
    x = apart[:, None] / (seen.std() if np.ptp(seen) > 0 else math.inf)
    slope = (x[known] * scores).sum(axis=0) / (m + ALIKE)
    centre = scores.mean(axis=0) + slope * x
    squares = np.square(scores - centre[known])
    level = squares.sum(axis=0) / max(m - 1, 1)
    tilt = (x[known] * squares).sum(axis=0) / (m + ALIKE)
    return centre, np.sqrt((level + tilt * x).clip(NARROWEST * level, WIDEST * level))


def anew(
    table: np.ndarray,
    ages: np.ndarray,
    costs: np.ndarray,
    ids: Sequence[str],
    rule: Rule,
    *,
    tokens: float,
    drift: Drift,
    seed: int,
) -> list[int]:
    """Places of the prompts to score anew, in the order in which they are taken.

    Args:
        table: float64 ``[n, sets]``, scores by earlier sketches; NaN for prompts without one.
        ages: how many stages old these are, ``[n]``.
        costs: tokens of each prompt, ``[n]``.
        ids: of the prompts.
        rule: the selection's, for these prompts.
        tokens: what all that are taken may cost together; infinity takes all.
        drift: what earlier stages have shown.
        seed: of the draws.
    """
    if tokens >= costs.sum():
        return list(range(len(ids)))
    ties = drawn_ties(ids, seed)
    shuffled = np.argsort(ties)
    first = _within(shuffled, costs, EXPLORE * tokens)
    p = _chosen(table, ages, rule, drift, seed)
    order = np.lexsort((ties, -p * (1 - p)))
    rest = order[~np.isin(order, first)]
    return [*first.tolist(), *_within(rest, costs, tokens - costs[first].sum()).tolist()]


def _within(order: np.ndarray, costs: np.ndarray, tokens: float) -> np.ndarray:
    """The first ones of an order, as long as they cost no more together."""
    return order[: int(np.searchsorted(np.cumsum(costs[order]), tokens, side="right"))]


def _chosen(table: np.ndarray, ages: np.ndarray, rule: Rule, drift: Drift, seed: int) -> np.ndarray:
    """The share of the draws in which each prompt is chosen."""
    known = np.isfinite(table).all(axis=1)
    if not known.any():
        return np.zeros(len(table))
    centre, spread = expected(table, rule.rates)
    walked = np.sqrt(np.maximum(ages, 0) * drift.variance)[:, None] * spreads(table)
    centre, moved = np.where(known[:, None], table, centre), np.where(known[:, None], walked, spread)
    rng, counts = np.random.default_rng(seed), np.zeros(len(table))
    for _ in range(DRAWS):
        counts[rule.choose(centre + moved * rng.standard_normal(table.shape))] += 1
    return counts / DRAWS


def affordable(share: float, others: float, spent: float, per_token: float) -> float:
    """Tokens that may be sketched, so that choosing takes at most a share b of a stage: ``(b / (1 - b) R - S) / c``.

    Args:
        share: b; with 1 nothing is bounded.
        others: R, seconds of the rest of a stage.
        spent: S, seconds of choosing beside the sketches of training prompts.
        per_token: c, seconds.

    >>> affordable(0.5, others=100.0, spent=25.0, per_token=0.25)
    300.0
    """
    return math.inf if share >= 1 else max(share / (1 - share) * others - spent, 0.0) / per_token
