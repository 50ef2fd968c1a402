"""Soft choices: prompts drawn without replacement instead of the best ones, and weights for all instead of a choice."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from cropi.errors import CropiError


def normal_scores(places: np.ndarray, size: int) -> np.ndarray:
    """The normal score of every place in a ranking of ``size``, from 1 (best): ``Phi^-1((size - place + 1/2) / size)``.

    Values of different methods have different scales (1, 1/2, 1/3 of fused ranks; cosines near 0.1): their places have
    one (van der Waerden 1952).
    """
    inverse = NormalDist().inv_cdf
    return np.array([inverse((size - place + 0.5) / size) for place in places])


def soft_weights(size: int, temperature: float = 1.0) -> np.ndarray:
    """A weight for every place in a ranking, float64 ``[size]``, best first, with mean 1.

        w = exp(z / temperature) / mean of it,        z the normal score of the place

    Raises:
        CropiError: a temperature that is not above 0.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise CropiError(f"temperature must be a number above 0, got {temperature!r}")
    z = normal_scores(np.arange(1, size + 1), size) / temperature
    weights = np.exp(z - z.max(initial=0.0))
    return weights / weights.mean() if size else weights


def draw(weights: np.ndarray, seed: int) -> np.ndarray:
    """The order in which all places are drawn without replacement, in proportion to ``weights``; zero weights are last.

    Every place gets the key ``log(u) / w`` and the highest come first (Efraimidis and Spirakis 2006), so that the first
    n are a draw of n for every n.
    """
    uniform = np.random.default_rng(seed).random(len(weights))
    # 1 - u is in (0, 1]: the logarithm is finite. Places of weight 0 keep their order behind all others.
    keys = np.full(len(weights), -math.inf)
    some = weights > 0
    keys[some] = np.log1p(-uniform[some]) / weights[some]
    return np.lexsort((np.arange(len(weights)), -keys))
