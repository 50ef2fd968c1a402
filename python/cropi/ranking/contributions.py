"""Which groups of parameters carry a choice: the mean contributions of the chosen prompts beside those of the pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cropi.ranking.scores import Scores


def mean_contributions(scores: Scores, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The mean contributions over all prompts with a score, and over the chosen ones: float64 ``[sets, groups]`` each.

    For every set, their differences add up to what the choice raises the mean score by.

    >>> from cropi.store.rows import RowInfo
    >>> parts = np.array([[[0.1, 0.0]], [[0.1, 0.3]]])
    >>> rows = [RowInfo("a"), RowInfo("b")]
    >>> scores = Scores(rows, ["v"], parts.sum(axis=2), {}, groups=["low", "high"], contributions=parts)
    >>> pool, some = mean_contributions(scores, [1])
    >>> (some - pool).round(2)
    array([[0.  , 0.15]])
    """
    assert scores.contributions is not None
    return scores.contributions[scores.usable].mean(axis=0), scores.contributions[list(chosen)].mean(axis=0)


def lines(scores: Scores, chosen: Sequence[int]) -> list[str]:
    """For each set what the choice raises the mean score by, and the groups that it comes from, largest first."""
    pool, some = mean_contributions(scores, chosen)
    made = []
    for name, raised in zip(scores.sets, some - pool, strict=True):
        parts = ", ".join(
            f"{scores.groups[g]} {raised[g]:+.4f}" for g in np.argsort(-np.abs(raised), kind="stable")
        )
        made.append(f"{name}: the chosen prompts' mean score is {raised.sum():+.4f} from the pool's: {parts}")
    return made
