"""Fewer responses of a prompt: drawn so that the gradient is right on average.

Advantages and divisors are those of the whole group. Of the responses with an advantage n are drawn, none twice,
response k with probability p_k, and its tokens' weights are multiplied by 1 / p_k (Horvitz and Thompson, J. Amer. Stat.
Assoc. 47, 1952): the expected gradient is that of all responses. Probabilities are proportional to
``|A_k| / d_k * sqrt(T_k)``, about the size of a response's part, and at most 1 (Madow's systematic draw, Ann. Math.
Stat. 20, 1949, in a random order).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cropi.gradient.estimators import Estimator
from cropi.gradient.tokenize import TokenGroup

Values = npt.NDArray[np.float64]


def inclusion(sizes: Values, n: int) -> Values:
    """Probabilities that are proportional to ``sizes``, at most 1, and add up to n (or to the sizes above 0).

    >>> inclusion(np.array([5.0, 1.0, 1.0, 0.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    found = np.zeros(len(sizes))
    left, sure = sizes > 0, 0
    if left.sum() <= n:
        found[left] = 1.0
        return found
    while True:
        shares = sizes * (n - sure) / sizes[left].sum()
        over = left & (shares >= 1.0)
        if not over.any():
            found[left] = shares[left]
            return found
        found[over], sure, left = 1.0, sure + int(over.sum()), left & ~over


def drawn(probabilities: Values, draws: np.random.Generator) -> list[int]:
    """Places of a draw in which each comes with its probability, as many as these add up to."""
    order = draws.permutation(len(probabilities))
    ends = np.cumsum(probabilities[order])
    points = np.arange(round(float(ends[-1]))) + draws.random()
    # The last point may lie a rounding behind the last end.
    places = np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)
    return sorted(int(order[i]) for i in set(places.tolist()))


def sampled(group: TokenGroup, n: int, estimator: Estimator, seed: str) -> TokenGroup:
    """The group with at most n different responses kept, and the factors of their weights.

    The draw depends on ``seed`` and the prompt's id alone. Equal responses are one.
    """
    advantages = np.abs(estimator.advantages(group.group.rewards))
    divisors, counts = estimator.divisors(group.lengths), np.asarray(group.lengths, dtype=np.float64)
    parts = advantages / divisors * np.sqrt(counts)
    sizes = np.array([parts[list(members)].sum() for members in group.equal])
    if len(sizes) <= n or not sizes.any():
        return group
    probabilities = inclusion(sizes, n)
    digest = hashlib.sha256(f"{seed}:{group.id}".encode()).digest()
    places = drawn(probabilities, np.random.default_rng(int.from_bytes(digest[:16], "little")))
    return replace(group, kept={group.equal[i][0]: float(1.0 / probabilities[i]) for i in places})
