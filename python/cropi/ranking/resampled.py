"""One validation set, resampled: the scores of all training prompts under any weights of its prompts.

Against the mean of a set's gradients, under weights w of its prompts::

    score = <u, sum_i w_i g_i> / |sum_i w_i g_i|

and against the nearest of its prompts, the largest of the products with those that have a weight. A draw of V prompts
with replacement from V holds the k-th nearest and none nearer with the probability ::

    p_k = ((V - k + 1) / V)^V - ((V - k) / V)^V

so that the bootstrap's mean and variance of the nearest are known without drawing. Its standard error is that of these
draws, times sqrt(V / (V - 1)) as their moves are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Pairwise

BLOCK = 1 << 14  # training prompts that are looked at together, in float64
KEPT = 64  # nearest prompts that draws look at: none of them is drawn once in e^64 draws


class Ties:
    """Rows that equal an earlier one. A matrix product rounds a row by its place, so that what equal rows are
    multiplied to would differ in the last bit, and that bit, not the id, would say which of them is chosen.

    Args:
        column: a column of the rows, ``[n]``: those that differ in it are not looked at.
        rows: gives rows by their places.
    """

    def __init__(self, column: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]) -> None:
        order = np.argsort(column, kind="stable")
        same = column[order[1:]] == column[order[:-1]]
        some = np.sort(order[np.append(same, False) | np.insert(same, 0, False)])
        # Digests: sorting 100,000 rows with as many copies took 14 s and 1.3 GB.
        firsts: dict[bytes, int] = {}
        before = np.empty_like(some)
        for start in range(0, len(some), BLOCK):
            places = some[start : start + BLOCK]
            before[start : start + BLOCK] = [
                firsts.setdefault(hashlib.sha256(row.tobytes()).digest(), place)
                for place, row in zip(places.tolist(), rows(places), strict=True)
            ]
        self._later, self._first = some[before < some], before[before < some]

    def settled(self, values: np.ndarray) -> np.ndarray:
        """The same ``values`` ``[..., n]``, in which every row has those of the first one that equals it."""
        if len(self._later):
            values[..., self._later] = values[..., self._first]
        return values


class ResampledSet(Protocol):
    """What :func:`cropi.ranking.resampling.uncertainty` needs of a validation set, which has two prompts or more."""

    name: str
    members: np.ndarray
    base: np.ndarray

    def score(self, weights: np.ndarray) -> np.ndarray:
        """The scores, float64 ``[usable]``, under weights of the set's prompts."""

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """The scores ``[B, usable]`` under several weights ``[B, V]`` of the prompts, in the dtype of the products."""

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        """Weights of a draw with replacement."""

    def moves(self, weights: np.ndarray) -> np.ndarray:
        """How far draws ``[B, V]`` of :meth:`resample` move the scores, ``[B, usable]``: with mean 0, and the variance
        that other prompts give. The length of the mean gradient, which moves no rank, stays as it is."""

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Weights of two halves."""

    def stderr(self) -> np.ndarray:
        """The standard error of every score."""

    def signal(self) -> float:
        """The signal's share of the mean gradient, |mu|^2 / E|m|^2; NaN without a mean."""


class _Drawn:
    base: np.ndarray

    @property
    def _widened(self) -> float:
        """Draws with replacement from n prompts vary (n - 1) / n times as much as other prompts do."""
        n = len(self.base)
        return math.sqrt(n / (n - 1))

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        n = len(self.base)
        return np.bincount(rng.integers(0, n, n), minlength=n) / n

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.base)
        order = rng.permutation(n)
        sides = np.zeros(n), np.zeros(n)
        for side, part in zip(sides, (order[: n // 2], order[n // 2 :]), strict=True):
            side[part] = 1.0 / len(part)
        return sides


class MeanSet(_Drawn):
    """Products with every prompt of the set, the weight of each in the mean, and the weighted gram."""

    def __init__(self, pairs: Pairwise, name: str, usable: np.ndarray, metric: str, mean: str) -> None:
        self.name, self.metric, self.usable = name, metric, usable
        self.members = members = pairs.members(name)
        one_run = members[-1] - members[0] == len(members) - 1
        self.dots = pairs.dots[:, members[0] : members[-1] + 1] if one_run else pairs.dots[:, members]
        self.lengths = pairs.norms[usable] if metric == "cosine" else np.ones(len(usable))
        self.inverse = (1 / self.lengths).astype(self.dots.dtype)
        self.scale = pairs.weights(members, mean) * len(members)  # 1, or 1 / |g_i|
        self.gram = pairs.gram[np.ix_(members, members)] * self.scale[:, None] * self.scale
        self.base = np.full(len(members), 1.0 / len(members))
        self._with_mean = self.gram @ self.base

        def directions(places: np.ndarray) -> np.ndarray:
            return np.asarray(self.dots[usable[places]] * self.inverse[places, None])

        self._ties = Ties(self.dots[usable, 0] * self.inverse, directions)

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """X [b, V] = <u, g_i> times each prompt's scale, float64, for b prompts at a time."""
        for start in range(0, len(self.usable), BLOCK):
            here = slice(start, start + BLOCK)
            yield here, self.dots[self.usable[here]] * self.scale / self.lengths[here, None]

    def _divisors(self, weights: np.ndarray) -> np.ndarray:
        """What products with the means of weights ``[B, V]`` are divided by: their lengths; infinity where a mean is
        zero, so that the scores are 0."""
        if self.metric != "cosine":
            return np.ones(len(weights))
        squares = np.einsum("bi,ij,bj->b", weights, self.gram, weights)
        return np.where(squares > 0, np.sqrt(np.maximum(squares, 0.0)), math.inf)

    def score(self, weights: np.ndarray) -> np.ndarray:
        scores = np.concatenate([block @ weights for _, block in self._blocks()])
        return self._ties.settled(np.asarray(scores / self._divisors(weights[None])[0]))

    def scores(self, weights: np.ndarray) -> np.ndarray:
        return self._products(weights / self._divisors(weights)[:, None])

    def _products(self, weights: np.ndarray) -> np.ndarray:
        products = (weights * self.scale).astype(self.dots.dtype) @ self.dots.T
        if len(self.usable) < len(self.dots):
            products = products[:, self.usable]
        if self.metric == "cosine":
            products *= self.inverse
        return self._ties.settled(np.asarray(products))

    def moves(self, weights: np.ndarray) -> np.ndarray:
        # A draw's mean, less its part along the mean of all.
        along = weights @ self._with_mean / (self.base @ self._with_mean)
        across = (weights - along[:, None] * self.base) / self._divisors(self.base[None])
        return self._products(across * self._widened)

    def stderr(self) -> np.ndarray:
        n = len(self.base)
        squared = float(self.base @ self._with_mean)
        errors = np.empty(len(self.usable))
        for here, values in self._blocks():
            if self.metric == "cosine":
                values = values / math.sqrt(squared)
                values = values - np.outer(values @ self.base, self._with_mean / squared)
            errors[here] = values.std(axis=1, ddof=1)
        return self._ties.settled(errors / math.sqrt(n))

    def signal(self) -> float:
        n = len(self.base)
        between = (self.gram.sum() - np.trace(self.gram)) / (n * (n - 1))
        return float(between / (self.base @ self.gram @ self.base))


class NearestSet(_Drawn):
    """Products with every prompt of the set, and for each training prompt the nearest ones in order."""

    def __init__(self, pairs: Pairwise, name: str, usable: np.ndarray, metric: str) -> None:
        self.name, self.members = name, pairs.members(name)
        lengths = np.sqrt(np.diagonal(pairs.gram))[self.members]
        products = pairs.dots[np.ix_(usable, self.members)]
        self.products = products / pairs.norms[usable, None] / lengths if metric == "cosine" else products
        self.nearest = np.argsort(-self.products, axis=1, kind="stable")[:, :KEPT]
        self.base = np.full(len(self.members), 1.0 / len(self.members))
        self._ties = Ties(self.products[:, 0], self.products.__getitem__)

    def score(self, weights: np.ndarray) -> np.ndarray:
        drawn = weights > 0
        scores = drawn[self.nearest]
        places = np.take_along_axis(self.nearest, scores.argmax(axis=1)[:, None], axis=1)
        values = np.take_along_axis(self.products, places, axis=1)[:, 0]
        none = ~scores.any(axis=1)
        if none.any():
            values[none] = self.products[np.ix_(none, drawn)].max(axis=1)
        return values

    def scores(self, weights: np.ndarray) -> np.ndarray:
        return np.stack([self.score(one) for one in weights])

    def moves(self, weights: np.ndarray) -> np.ndarray:
        return (self.scores(weights) - self._of_draws()[0]) * self._widened

    def _of_draws(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the standard deviation of each score over draws with replacement."""
        n = len(self.base)
        left = np.arange(n, -1, -1) / n
        share = left[:-1] ** n - left[1:] ** n
        ordered = -np.sort(-self.products, axis=1)
        mean = self._ties.settled(ordered @ share)
        squares = self._ties.settled((ordered - mean[:, None]) ** 2 @ share)
        return mean, np.sqrt(np.maximum(squares, 0.0))

    def stderr(self) -> np.ndarray:
        return self._of_draws()[1] * self._widened

    def signal(self) -> float:
        return math.nan
