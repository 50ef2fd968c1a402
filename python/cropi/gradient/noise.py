"""A draw of the noise that a prompt's gradient has from its finite number of responses.

With s_k the part of response k before its advantage, ``g = sum_k A_k s_k``. Put another vector B in the place of A: if
B is as long as A and orthogonal to the constants and to A itself, then ``d = sum_k B_k s_k`` has

    E d = 0        Cov(d) = sum_k B_k^2 Cov(s_k) = |A|^2 Cov(s) = Cov(g)

given the rewards, where the mean of s_k is any constant plus any multiple of the reward (for rewards of two values: any
function of it), and its covariance is the same for all responses. It is the contrast of an analysis of variance: two of
the K degrees of freedom are the group's mean and its signal, and one of the others is drawn. The group's mean is so
taken into account; its standard deviation, which scales the whole gradient and does not change its direction, is not.

B is drawn as A times independent normal numbers, made orthogonal and as long as A: responses with a large weight have
a large one in the draw too, so that covariances that differ between right and wrong responses do little harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cropi.gradient.tokenize import TokenGroup

FEWEST = 3  # responses: two have no degree of freedom beside mean and signal
TOO_FEW = "two responses: their noise cannot be told from the gradient"


def noise_of(advantages: Sequence[float] | np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """B for the advantages A ``[K]`` of one prompt, K at least 3: float64 ``[K]``.

    >>> made = noise_of([1.5, -0.5, -0.5, -0.5], np.random.default_rng(0))
    >>> bool(abs(made.sum()) < 1e-12), bool(abs(made[0]) < 1e-12), round(float(made @ made), 6)
    (True, True, 3.0)

    Raises:
        ValueError: fewer than three advantages, or all of them equal.
    """
    values = np.asarray(advantages, dtype=np.float64)
    if values.ndim != 1 or values.size < FEWEST:
        raise ValueError(f"advantages: at least {FEWEST} are needed to draw their noise, got {values.size}")
    centred = values - values.mean()
    length = np.linalg.norm(centred)
    if not length > 0:
        raise ValueError("advantages: all of them are equal, so that the gradient is zero and has no noise")
    signal = centred / length
    made = values * draws.standard_normal(values.size)
    for _ in range(2):  # the second time takes off what rounding left of the first
        made -= made.mean()
        made -= (made @ signal) * signal
    return np.asarray(made * (np.linalg.norm(values) / np.linalg.norm(made)))


def noisy(group: TokenGroup, advantages: np.ndarray, seed: str) -> TokenGroup:
    """The group with noise in the place of its advantages; the draw depends on ``seed`` and the prompt's id alone."""
    digest = hashlib.sha256(f"{seed}:{group.id}".encode()).digest()
    draws = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    return replace(group, noise=tuple(noise_of(advantages, draws).tolist()))
