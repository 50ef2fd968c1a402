"""The choice made again, by score tables that other validation prompts would give.

A table c holds the noise of its own validation prompts, and chosen are, among others, those for which this noise is
high: a bootstrap draw, which adds noise to c, agrees with c more than a table of other prompts does. For each set let T
be the variance of the scores over the training prompts, and d how far a draw moves them: it has mean 0, and s^2 is its
variance over draws and training prompts, less what moves all of these alike. If the noise and the scores without it are
normal, a table of other prompts is, given c (Efron and Morris, *Stein's paradox in statistics*, 1977)::

    mean(c) + r (c - mean(c)) + sqrt(1 + r) d,        r = max(1 - s^2 / T, 0).

For a rule that runs in groups (files, tasks), means and variances are those within groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cropi.ranking.resampled import ResampledSet
from cropi.ranking.rule import Rule

MOST_SCORES = 1 << 24  # of some draws together: 64 MB


class Moved(NamedTuple):
    """How the choice moves, as shares: ``p_selected`` [usable], and of the chosen prompts those that stay chosen."""

    p_selected: np.ndarray
    overlap: float
    of_set: dict[str, float]
    halves: float


def redrawn(
    sets: Sequence[ResampledSet],
    table: np.ndarray,
    rule: Rule,
    contrasted: Callable[[list[np.ndarray]], np.ndarray],
    own: np.ndarray | None,
    draws: int,
    seed: int,
) -> Moved:
    """Choose again from ``draws`` tables of other validation prompts, and from a quarter as many with one set drawn
    anew and with two halves of every set.

    Args:
        sets: what scores are drawn from.
        table: the scores by all validation prompts, float64 ``[n, ranked sets]``.
        rule: of the choice.
        contrasted: makes a table of the sets' scores.
        own: what other responses of their own would move scores by, of some prompts ``[m, ranked sets]``, or None.
    """
    rng, n = np.random.default_rng(seed), len(table)
    chosen, counts, halves = _mask(rule.choose(table), n), np.zeros(n), 0.0
    for other in _tables(sets, sets, table, rule, contrasted, own, draws, rng):
        counts[rule.choose(other)] += 1
    small = max(draws // 4, 2)
    alone = {
        one.name: float(
            np.mean(
                [
                    chosen[rule.choose(other)].mean()
                    for other in _tables(sets, [one], table, rule, contrasted, None, small, rng)
                ]
            )
        )
        for one in sets
    }
    for _ in range(small):
        drawn = [one.scores(np.stack(one.halves(rng))) for one in sets]
        sides = [rule.choose(contrasted([scores[side] for scores in drawn])) for side in (0, 1)]
        halves += float(_mask(sides[0], n)[sides[1]].mean()) / small
    return Moved(counts / draws, float(counts[chosen].mean()) / draws, alone, halves)


def _tables(
    sets: Sequence[ResampledSet],
    anew: Sequence[ResampledSet],
    table: np.ndarray,
    rule: Rule,
    contrasted: Callable[[list[np.ndarray]], np.ndarray],
    own: np.ndarray | None,
    draws: int,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Score tables by other prompts of the sets ``anew`` (and other responses of the training prompts), as the head of
    this file has them; the other arguments are those of :func:`redrawn`."""
    n, still = len(table), np.zeros(len(table))
    together = max(1, MOST_SCORES // (len(sets) * n))
    shrunk, factor = table, np.ones(table.shape[1])
    for start in range(0, draws, together):
        count = min(together, draws - start)
        moves = [
            one.moves(np.stack([one.resample(rng) for _ in range(count)])) if one in anew else None
            for one in sets
        ]

        def of_draw(i: int) -> np.ndarray:
            return contrasted([still if one is None else one[i] for one in moves])  # noqa: B023

        if start == 0:
            noise = np.mean([_within(of_draw(i), rule)[1] for i in range(count)], axis=0)
            noise += 0.0 if own is None else np.square(own).mean(axis=0)
            centre, spread = _within(table, rule)
            share = np.divide(noise, spread, out=np.zeros_like(noise), where=spread > 0)
            kept = np.maximum(1 - share, 0.0)
            shrunk, factor = centre + kept * (table - centre), np.sqrt(1 + kept)
        for i in range(count):
            moved = of_draw(i)
            if own is not None:
                moved = moved + own[rng.integers(0, len(own), n)] * rng.choice((-1.0, 1.0), n)[:, None]
            yield shrunk + factor * moved


def _within(table: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """The mean of every prompt's group, ``[n, sets]``, and the variances of a table within groups, ``[sets]``."""
    centre, squares, degrees = table.copy(), np.zeros(table.shape[1]), 0
    for places, _ in rule.groups:
        own = table if len(places) == len(table) else table[places]
        centre[places] = mean = own.mean(axis=0, dtype=np.float64)
        squares += np.square(own - mean).sum(axis=0)
        degrees += len(places) - 1
    return centre, squares / max(degrees, 1)


def _mask(places: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[places] = True
    return mask
