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

from collections.abc import Iterator, Sequence
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
    shares: np.ndarray,
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
        shares: what each set's scores count for in the columns of a table, float64 ``[sets, ranked sets]``.
        own: what other responses of their own would move scores by, of some prompts ``[m, ranked sets]``, or None.
    """
    rng, n = np.random.default_rng(seed), len(table)
    chosen, counts, halves = _mask(rule.choose(table), n), np.zeros(n), 0.0
    for other in _tables(sets, table, rule, shares, own, draws, rng):
        counts[rule.choose(other)] += 1
    small, alone = max(draws // 4, 2), {}
    for one, share in zip(sets, shares, strict=True):
        moving = np.flatnonzero(share)
        beside = rule.counted(np.delete(table, moving, axis=1))
        others = _tables([one], table[:, moving], rule, share[None, moving], None, small, rng)
        alone[one.name] = float(np.mean([chosen[rule.choose(other, beside)].mean() for other in others]))
    for _ in range(small):
        drawn = [one.scores(np.stack(one.halves(rng))) for one in sets]
        sides = [rule.choose(combined([scores[side] for scores in drawn], shares)) for side in (0, 1)]
        halves += float(_mask(sides[0], n)[sides[1]].mean()) / small
    return Moved(counts / draws, float(counts[chosen].mean()) / draws, alone, halves)


def _tables(
    sets: Sequence[ResampledSet],
    table: np.ndarray,
    rule: Rule,
    shares: np.ndarray,
    own: np.ndarray | None,
    draws: int,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Score tables by other prompts of the sets (and other responses of the training prompts), as the head of this
    file has them; the arguments are those of :func:`redrawn`. A table is overwritten by the next one."""
    n, moved = len(table), np.empty_like(table)
    together = max(1, MOST_SCORES // (len(sets) * n))
    shrunk, factor = table, np.ones(table.shape[1])
    for start in range(0, draws, together):
        count = min(together, draws - start)
        moves = [one.moves(np.stack([one.resample(rng) for _ in range(count)])) for one in sets]
        if start == 0:
            of_draws = (combined([one[i] for one in moves], shares, moved) for i in range(count))
            noise = np.mean([_within(of_draw, rule)[1] for of_draw in of_draws], axis=0)
            noise += 0.0 if own is None else np.square(own).mean(axis=0)
            centre, spread = _within(table, rule)
            part = np.divide(noise, spread, out=np.zeros_like(noise), where=spread > 0)
            kept = np.maximum(1 - part, 0.0)
            shrunk, factor = centre + kept * (table - centre), np.sqrt(1 + kept)
        for i in range(count):
            combined([one[i] for one in moves], shares, moved)
            if own is not None:
                moved += own[rng.integers(0, len(own), n)] * rng.choice((-1.0, 1.0), n)[:, None]
            moved *= factor
            moved += shrunk
            yield moved


def combined(of_sets: Sequence[np.ndarray], shares: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Every set's numbers, ``[n]`` each, by the shares ``[sets, columns]``: float64 ``[n, columns]``, a column in one
    run."""
    table = np.empty((shares.shape[1], len(of_sets[0]))).T if out is None else out
    for v, column in enumerate(shares.T):
        first, *others = np.flatnonzero(column).tolist()
        np.multiply(of_sets[first], column[first], out=table[:, v])
        for i in others:
            table[:, v] += column[i] * of_sets[i]
    return table


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
