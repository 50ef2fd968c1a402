"""The usefulness of a prompt, predicted from visits of other prompts with similar features.

Every prompt i has a row of features x_i, of about length 1. Its usefulness is taken for

    u_i = m + x_i b + r_i,        b ~ N(0, a I),  r_i ~ N(0, t^2),

and the average of its visits, v_i, for u_i and an error of variance e^2 / w_i, where w_i is what the visits count
(:mod:`cropi.ranking.exploring`). Let d_i = t^2 + e^2 / w_i. Sums go over the prompts that were visited; g_i is t^2 /
d_i for these and 0 for the others. Then there is known (Bishop, Pattern Recognition and Machine Learning, 2006, 3.3)

    b    as N(c, C),   C = (I / a + sum_i x_i x_i^T / d_i)^-1,   c = C sum_i x_i (v_i - m) / d_i
    u_i  as N(m + x_i c + g_i (v_i - m - x_i c),  (1 - g_i)^2 x_i C x_i^T + (1 - g_i) t^2).

e^2 is measured from repeated visits, as without features, and the variance V of the averages stands for it before
there are any. a may be each of `SHARES` of V, and t^2 is the rest of V: what is known is the mixture of what each
says, as likely as it makes the averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cropi.checked import fits
from cropi.errors import CropiError
from cropi.ranking.exploring import FIRST, Noise, Values

SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
LEAST = 1 / 16  # of V is t^2 at least
RARE = 0.01  # shares that are less likely than this beside the likeliest are left out
VISITS = 10  # that V counts as, in e^2
CHUNK = 16384  # rows of features that are float64 at one time


def known_alike(
    values: Values, weight: Values, noise: Noise, features: npt.NDArray[np.float32]
) -> tuple[Values, Values]:
    """Means and standard deviations of the usefulness of every prompt.

    Args:
        values: the average that visits showed, float64 ``[n]``; anything where ``weight`` is 0.
        weight: what those visits count, float64 ``[n]``.
        noise: what repeated visits have shown.
        features: ``[n, k]``.
    """
    seen = np.flatnonzero(weight > 0)
    if not len(seen):
        return np.zeros(len(values)), np.full(len(values), FIRST)
    v, w, x = values[seen], weight[seen], features[seen].astype(np.float64)
    mean = float(np.average(v, weights=w / (w + 1.0)))
    total = float(v.var(ddof=1)) if len(seen) > 1 else 0.0
    total = total or FIRST**2
    error = (noise.total + VISITS * total) / (noise.count + VISITS) / w
    rest = total - float(error.mean())
    tries = [
        _Shared(v - mean, error, x, share * total, max(rest - share * total, LEAST * total))
        for share in SHARES
    ]
    # How likely each share is made by the averages, and what is known under it: the mixture's mean and variance.
    chances = np.exp([one.likelihood - max(other.likelihood for other in tries) for one in tries])
    chances = np.where(chances < RARE, 0.0, chances)
    means, squares = np.zeros(len(values)), np.zeros(len(values))
    for chance, one in zip(chances / chances.sum(), tries):
        if chance:
            middle, variance = _under(one, values, error, seen, features, mean)
            means += chance * middle
            squares += chance * (variance + middle**2)
    return means, np.sqrt(np.maximum(squares - means**2, 0.0))


def _under(
    one: _Shared, values: Values, error: Values, seen: Any, features: npt.NDArray[np.float32], mean: float
) -> tuple[Values, Values]:
    """Means and variances of the usefulness of every prompt under one a."""
    own = np.zeros(len(values))
    own[seen] = one.own / (one.own + error)
    means, variances = np.full(len(values), mean), np.zeros(len(values))
    if one.share:
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            wide = features[part].astype(np.float64)
            means[part] += wide @ one.center
            variances[part] = np.square(wide @ one.root).sum(axis=1)
    means[seen] += own[seen] * (values[seen] - means[seen])
    return means, (1 - own) ** 2 * variances + (1 - own) * one.own


class _Shared:
    """b under one a: ``center`` is c, and ``root`` a matrix R with ``R R^T = C``."""

    def __init__(self, off: Values, error: Values, x: Values, share: float, own: float) -> None:
        self.share, self.own = share, own
        d = own + error
        self.likelihood = -0.5 * float((np.log(d) + off**2 / d).sum())
        if share:
            scaled = x / d[:, None]
            precision = scaled.T @ x
            precision[np.diag_indices_from(precision)] += 1 / share
            low = np.linalg.cholesky(precision)
            unit = torch.eye(len(low), dtype=torch.float64, device="cpu")
            self.root = torch.linalg.solve_triangular(torch.from_numpy(low), unit, upper=False).numpy().T
            half = self.root.T @ (scaled.T @ off)
            self.center = self.root @ half
            gain = (
                float(half @ half) - 2 * float(np.log(np.diag(low)).sum()) - len(low) * float(np.log(share))
            )
            self.likelihood += 0.5 * gain


def prompt_features(prompts: Sequence[Sequence[int]], dim: int = 256) -> npt.NDArray[np.float32]:
    """Features of prompts by their own tokens: no model is run.

    They are square roots of the counts of tokens, of pairs of neighbours and of the length's power of two, hashed to
    ``dim`` numbers and weighed by the logarithm of how rare each is among these prompts.

    Args:
        prompts: the token ids of each.
        dim: numbers of a prompt.

    Returns:
        float32 ``[n, dim]``, rows of length 1 (zero where a prompt has nothing that others lack).

    Raises:
        CropiError: a ``dim`` below 1, or a prompt that is not a list of token ids.

    >>> prompt_features([[1, 2, 3], [1, 2]], dim=16).shape
    (2, 16)
    """
    if not fits(dim, int) or dim < 1:
        raise CropiError(f"dim is {dim!r}: give a number of at least 1")
    counts = np.zeros((len(prompts), dim), dtype=np.float32)
    for number, prompt in enumerate(prompts):
        given = np.asarray(prompt)
        if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise CropiError(f"prompt {number} is {prompt!r:.100}: give its token ids")
        ids = given.astype(np.uint64)
        before = np.concatenate([np.array([1 << 40], dtype=np.uint64), ids])[:-1]
        length = np.array([(1 << 41) + len(ids).bit_length()], dtype=np.uint64)
        parts = np.concatenate([ids, before * np.uint64(0x9E3779B97F4A7C15) + ids, length])
        np.add.at(counts[number], (_mixed(parts) % np.uint64(dim)).astype(np.int64), 1.0)
    rare = np.log((1 + len(counts)) / (1 + np.count_nonzero(counts, axis=0)))
    for start in range(0, len(counts), CHUNK):
        part = slice(start, start + CHUNK)
        rows = np.sqrt(counts[part], dtype=np.float64) * rare
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        counts[part] = rows / np.where(length > 0, length, 1.0)
    return counts


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The bits of integers, mixed (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    made: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return made
