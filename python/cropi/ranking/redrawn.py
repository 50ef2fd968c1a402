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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from cropi.ranking.resampled import ResampledSet
from cropi.ranking.rule import Rule

MOST_SCORES = 1 << 24  # of some draws together: 64 MB
# The noise is the mean over so many draws at least, of all where there are fewer. The spread of a single draw may be
# off by its own size, where most of the noise lies in one direction.
TELLING = 32


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
    import torch  # not above: what a table holds of uncertainty is read without it

    rng, n = np.random.default_rng(0), len(table)
    chosen, counts = _mask(rule.choose(table), n), np.zeros(n)
    small, alone = max(draws // 4, 2), {}
    with ThreadPoolExecutor(torch.get_num_threads(), "cropi-draws") as pool:
        for places in _choices(pool, sets, table, rule, shares, own, draws, rng):
            counts[places] += 1
        beside = list(_without_each(table, rule))
        for one, share in zip(sets, shares, strict=True):
            moving = np.flatnonzero(share)
            rest = beside[moving[0]] if len(moving) < table.shape[1] else None
            others = _choices(
                pool, [one], table[:, moving], rule, share[None, moving], None, small, rng, rest
            )
            alone[one.name] = float(np.mean([chosen[places].mean() for places in others]))

        def agreement(halves: Sequence[np.ndarray]) -> float:
            scores = [one.scores(half) for one, half in zip(sets, halves, strict=True)]
            sides = [_choice(rule, [part[side] for part in scores], shares=shares) for side in (0, 1)]
            return float(_mask(sides[0], n)[sides[1]].mean())

        drawn = [[np.stack(one.halves(rng)) for one in sets] for _ in range(small)]
        halves = sum(agreed / small for agreed in pool.map(agreement, drawn))
    return Moved(counts / draws, float(counts[chosen].mean()) / draws, alone, halves)


def _without_each(table: np.ndarray, rule: Rule) -> Iterator[np.ndarray | None]:
    """For every column, what :meth:`Rule.counted` gives of the others; None where there are none."""
    columns = [table[:, v : v + 1] for v in range(table.shape[1])]
    behind: list[np.ndarray | None] = [None]
    for column in columns[:0:-1]:
        behind.append(rule.counted(column, behind[-1]))
    before = None
    for column, after in zip(columns, reversed(behind), strict=True):
        yield after if before is None else before if after is None else rule.joined(before, after)
        before = rule.counted(column, before)


def _choices(
    pool: Executor,
    sets: Sequence[ResampledSet],
    table: np.ndarray,
    rule: Rule,
    shares: np.ndarray,
    own: np.ndarray | None,
    draws: int,
    rng: np.random.Generator,
    beside: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The choices from score tables by other prompts of the sets (and other responses of the training prompts), as the
    head of this file has them; the arguments are those of :func:`redrawn`, and ``beside`` that of
    :meth:`Rule.choose`. The next draws are multiplied while the last ones are ranked."""
    n = len(table)
    together = max(1, MOST_SCORES // (len(sets) * n))
    seeds = np.zeros(draws, dtype=np.int64) if own is None else rng.integers(0, 1 << 63, draws)

    def resampled() -> Iterator[list[np.ndarray]]:
        """Each set's weights of so many draws as are multiplied together."""
        block = max(together, TELLING)
        for start in range(0, draws, block):
            count = min(block, draws - start)
            weights = [np.stack([one.resample(rng) for _ in range(count)]) for one in sets]
            for i in range(0, count, together):
                yield [of_set[i : i + together] for of_set in weights]

    def submitted(weights: Sequence[np.ndarray]) -> list[Future[np.ndarray]]:
        return [pool.submit(one.moves, drawn) for one, drawn in zip(sets, weights, strict=True)]

    def moved(parts: Sequence[Future[np.ndarray]]) -> list[list[np.ndarray]]:
        moves = [part.result() for part in parts]
        return [[one[i] for one in moves] for i in range(len(moves[0]))]

    def spreads(drawn: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        return list(pool.map(lambda of_draw: _within(combined(of_draw, shares), rule)[1], drawn))

    every = resampled()
    telling = list(islice(every, -(-TELLING // together)))
    every, done = chain(telling, every), 0
    ahead, shrunk, factor = submitted(next(every)), table, np.ones(table.shape[1])
    while ahead:
        drawn = moved(ahead)
        if done == 0:
            found = spreads(drawn)
            # Where a draw is large, few are in memory together: those that tell the noise are multiplied twice.
            for weights in telling[1:]:
                found += spreads(moved(submitted(weights)))
            noise = np.mean(found, axis=0)
            noise += 0.0 if own is None else np.square(own).mean(axis=0)
            centre, between = _within(table, rule)
            part = np.divide(noise, between, out=np.zeros_like(noise), where=between > 0)
            kept = np.maximum(1 - part, 0.0)
            shrunk, factor = np.asfortranarray(centre + kept * (table - centre)), np.sqrt(1 + kept)
        following = next(every, None)
        ahead = [] if following is None else submitted(following)
        choose = partial(_choice, rule, shares=shares, beside=beside, shrunk=shrunk, factor=factor, own=own)
        yield from pool.map(choose, drawn, seeds[done : done + len(drawn)])
        done += len(drawn)


def _choice(
    rule: Rule,
    of_sets: Sequence[np.ndarray],
    seed: int = 0,
    *,
    shares: np.ndarray,
    beside: np.ndarray | None = None,
    shrunk: np.ndarray | None = None,
    factor: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """The chosen places by the sets' scores, or by moves of the ``shrunk`` scores; one column in memory at a time. The
    seed is that of the other responses."""
    value, n, rng = beside, len(of_sets[0]), np.random.default_rng(seed)
    if own is not None:
        others, signs = rng.integers(0, len(own), n), rng.choice((-1.0, 1.0), n)
    for v in range(shares.shape[1]):
        column = combined(of_sets, shares[:, v : v + 1])
        if own is not None:
            column[:, 0] += own[others, v] * signs
        if shrunk is not None and factor is not None:
            column *= factor[v]
            column += shrunk[:, v : v + 1]
        value = rule.counted(column, value)
    assert value is not None
    return rule.best(value)


def combined(of_sets: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    """Every set's numbers, ``[n]`` each, by the shares ``[sets, columns]``: float64 ``[n, columns]``, a column in one
    run."""
    table = np.empty((shares.shape[1], len(of_sets[0]))).T
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
