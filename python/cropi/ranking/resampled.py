"""One validation set, resampled: the scores of all training prompts under any weights of its prompts.

Against the mean of a set's gradients, under weights w of its prompts::

    score = <u, sum_i w_i g_i> / |sum_i w_i g_i|

and against the nearest of its prompts, the largest of the products with those that have a weight. A draw of V prompts
with replacement from V holds the k-th nearest and none nearer with the probability ::

    p_k = ((V - k + 1) / V)^V - ((V - k) / V)^V

so that the bootstrap's variance of the nearest is known without drawing.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from cropi.ranking.pairwise import Pairwise

KEPT = 64  # nearest prompts that draws look at: none of them is drawn once in e^64 draws


class ResampledSet(Protocol):
    """What :func:`cropi.ranking.uncertainty.uncertainty` asks of a validation set."""

    name: str
    members: np.ndarray
    base: np.ndarray

    def score(self, weights: np.ndarray) -> np.ndarray:
        """The scores, float64 ``[usable]``, under weights of the set's prompts."""

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        """Weights of a draw with replacement."""

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Weights of two halves; a set of one prompt stands in both."""

    def stderr(self) -> np.ndarray:
        """The standard error of every score, NaN for a set of one prompt."""

    def signal(self) -> float:
        """|mu|^2 / E|m|^2; NaN where there is no mean, or one prompt."""


class _Drawn:
    base: np.ndarray

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        n = len(self.base)
        return np.bincount(rng.integers(0, n, n), minlength=n) / n

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.base)
        if n == 1:
            return self.base, self.base
        order = rng.permutation(n)
        sides = np.zeros(n), np.zeros(n)
        for side, part in zip(sides, (order[: n // 2], order[n // 2 :]), strict=True):
            side[part] = 1.0 / len(part)
        return sides


class MeanSet(_Drawn):
    """X [usable, V] = <u, g_i> times each prompt's weight in the mean, and the weighted gram."""

    def __init__(self, pairs: Pairwise, name: str, usable: np.ndarray, metric: str, mean: str) -> None:
        self.name, self.metric = name, metric
        self.members = pairs.members(name)
        lengths = pairs.norms[usable, None] if metric == "cosine" else 1.0
        scale = pairs.weights(self.members, mean) * len(self.members)  # 1, or 1 / |g_i|
        self.products = pairs.dots[np.ix_(usable, self.members)] * scale / lengths
        self.gram = pairs.gram[np.ix_(self.members, self.members)] * scale[:, None] * scale
        self.base = np.full(len(self.members), 1.0 / len(self.members))

    def score(self, weights: np.ndarray) -> np.ndarray:
        column = self.products @ weights
        return column / math.sqrt(weights @ self.gram @ weights) if self.metric == "cosine" else column

    def stderr(self) -> np.ndarray:
        n = len(self.base)
        if n == 1:
            return np.full(len(self.products), math.nan)
        values = self.products
        if self.metric == "cosine":
            with_mean = self.gram @ self.base
            squared = float(self.base @ with_mean)
            values = values / math.sqrt(squared) - np.outer(self.score(self.base), with_mean / squared)
        return values.std(axis=1, ddof=1) / math.sqrt(n)

    def signal(self) -> float:
        n = len(self.base)
        if n == 1:
            return math.nan
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

    def score(self, weights: np.ndarray) -> np.ndarray:
        drawn = weights > 0
        found = drawn[self.nearest]
        places = np.take_along_axis(self.nearest, found.argmax(axis=1)[:, None], axis=1)
        values = np.take_along_axis(self.products, places, axis=1)[:, 0]
        none = ~found.any(axis=1)
        if none.any():
            values[none] = self.products[np.ix_(none, drawn)].max(axis=1)
        return values

    def stderr(self) -> np.ndarray:
        n = len(self.base)
        if n == 1:
            return np.full(len(self.products), math.nan)
        left = np.arange(n, -1, -1) / n
        share = left[:-1] ** n - left[1:] ** n
        ordered = -np.sort(-self.products, axis=1)
        mean = ordered @ share
        return np.sqrt(np.maximum((ordered - mean[:, None]) ** 2 @ share, 0.0))

    def signal(self) -> float:
        return math.nan
