"""Fewer responses of a prompt, or fewer of their tokens: drawn so that the gradient is right on average.

Advantages and divisors are those of the whole group. *Responses*: of those with an advantage n are drawn, none twice,
response k with probability p_k, and its tokens' weights are multiplied by 1 / p_k (Horvitz and Thompson, J. Amer. Stat.
Assoc. 47, 1952): the expected gradient is that of all responses. Probabilities are proportional to
``|A_k| / d_k * sqrt(T_k)``, about the size of a response's part, and at most 1 (Madow's systematic draw, Ann. Math.
Stat. 20, 1949, in a random order). *Tokens*: of the T scored tokens of a response ceil(share T) are drawn, all alike,
and their weights are multiplied by T / ceil(share T).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cropi.errors import CropiError
from cropi.gradient.estimators import Estimator
from cropi.gradient.noise import noisy
from cropi.gradient.tokenize import TokenGroup

Values = npt.NDArray[np.float64]


def inclusion(sizes: Values, n: int) -> Values:
    """Probabilities that are proportional to ``sizes``, at most 1, and add up to n (or to the sizes above 0).

    >>> inclusion(np.array([5.0, 1.0, 1.0, 0.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    probabilities = np.zeros(len(sizes))
    left, sure = sizes > 0, 0
    if left.sum() <= n:
        probabilities[left] = 1.0
        return probabilities
    while True:
        shares = sizes * (n - sure) / sizes[left].sum()
        over = left & (shares >= 1.0)
        if not over.any():
            probabilities[left] = shares[left]
            return probabilities
        probabilities[over], sure, left = 1.0, sure + int(over.sum()), left & ~over


def drawn(probabilities: Values, draws: np.random.Generator) -> list[int]:
    """Places of a draw in which each comes with its probability, as many as these add up to."""
    order = draws.permutation(len(probabilities))
    ends = np.cumsum(probabilities[order])
    points = np.arange(round(float(ends[-1]))) + draws.random()
    # The last point may lie a rounding behind the last end.
    places = np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)
    return sorted(int(order[i]) for i in set(places.tolist()))


@dataclass(frozen=True)
class Subset:
    """Which responses and tokens of a prompt are sketched. The draws depend on ``seed`` and the prompt's id alone.

    Attributes:
        responses: at most so many different ones; None: all.
        tokens: the share of each response's scored tokens; None: all.
        noise: a draw of the gradient's noise in its place (:mod:`cropi.gradient.noise`).
        seed: of the draws.
    """

    responses: int | None = None
    tokens: float | None = None
    noise: bool = False
    seed: str = ""

    def check(self, estimator: Estimator) -> None:
        """Raises CropiError: the estimator, or the draw of noise, needs what would be left out."""
        if self.noise and not estimator.centred:
            raise CropiError(
                "noise is that of sampled responses, by their rewards, and the estimator takes demonstrations: leave "
                "one of both out"
            )
        left = {"responses": self.responses, "token_share": self.tokens}
        for name, value in left.items() if self.noise else ():
            if value is not None:
                raise CropiError(
                    f"noise is drawn from all responses of a prompt and all of their tokens, and {name} is {value}: "
                    "leave one of both out"
                )
        if self.tokens is not None and estimator.level == "sequence":
            raise CropiError(
                f"token_share {self.tokens}: the estimator {estimator.name!r} has a ratio of whole responses, which "
                "needs all of their tokens; leave token_share out, or take responses"
            )

    def of(self, group: TokenGroup, estimator: Estimator) -> TokenGroup:
        """The group, with the responses and tokens that are drawn."""
        if self.noise:
            return noisy(group, estimator.advantages(group.group.rewards), self.seed)
        if self.responses is not None:
            group = _some_responses(group, self.responses, estimator, self._draws(group, ""))
        if self.tokens is not None and self.tokens < 1:
            group = _some_tokens(group, self.tokens, self._draws(group, ":tokens"))
        return group

    def _draws(self, group: TokenGroup, what: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}:{group.id}{what}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _some_responses(
    group: TokenGroup, n: int, estimator: Estimator, draws: np.random.Generator
) -> TokenGroup:
    """At most n different responses, and the factors of their weights. Equal responses are one."""
    advantages = np.abs(estimator.advantages(group.group.rewards))
    divisors, counts = estimator.divisors(group.lengths), np.asarray(group.lengths, dtype=np.float64)
    parts = advantages / divisors * np.sqrt(counts)
    sizes = np.array([parts[list(members)].sum() for members in group.equal])
    if len(sizes) <= n or not sizes.any():
        return group
    probabilities = inclusion(sizes, n)
    places = drawn(probabilities, draws)
    return replace(group, kept={group.equal[i][0]: float(1.0 / probabilities[i]) for i in places})


def _some_tokens(group: TokenGroup, share: float, draws: np.random.Generator) -> TokenGroup:
    """Draw a share of the scored tokens of each response that is kept; equal responses keep the same tokens."""
    places = {}
    for k, *_ in group.equal:
        count = group.lengths[k]
        chosen = draws.choice(count, math.ceil(share * count), replace=False)
        places[k] = sorted(chosen.tolist())
    return replace(group, places=places)
