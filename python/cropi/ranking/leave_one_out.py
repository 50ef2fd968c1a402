"""What the choice would be without each validation prompt: which of them decide it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cropi.options import Selecting
from cropi.ranking.pairwise import Pairwise
from cropi.ranking.resampled import MeanSet
from cropi.ranking.rule import Rule
from cropi.ranking.values import check_from_scores


@dataclass(frozen=True)
class WithoutOne:
    """A validation prompt, and what happens without it.

    ``kept`` is the share of the chosen prompts that stay chosen, ``moved`` the largest change of a score of its set.
    """

    id: str
    set: str
    kept: float
    moved: float


def leave_one_out(
    pairs: Pairwise, *, metric: str = "cosine", mean: str = "plain", selecting: Selecting | None = None
) -> list[WithoutOne]:
    """Every validation prompt by how much of the choice hangs on it, those that decide most first.

    The only prompt of a set cannot be left out, and is not in the list.

    Args:
        pairs: what :func:`cropi.ranking.pairwise.pairwise` gives.
        metric, mean: as in :class:`cropi.options.Influence`.
        selecting: the options of the choice; a method that ranks by scores.

    Raises:
        CropiError: a method that does not depend on validation prompts, or what :class:`~cropi.ranking.rule.Rule`
        raises.
    """
    given = selecting or Selecting()
    check_from_scores(given.method)
    usable = pairs.usable
    rule = Rule(pairs.rows, usable, given)
    sets = [MeanSet(pairs, name, usable, metric, mean) for name in pairs.sets]
    table = np.stack([one.score(one.base) for one in sets], axis=1)
    chosen = rule.choose(table)
    without = []
    for v, one in enumerate(sets):
        n = len(one.base)
        for place, member in enumerate(one.members) if n > 1 else ():
            weights = np.full(n, 1.0 / (n - 1))
            weights[place] = 0.0
            other = table.copy()
            other[:, v] = one.score(weights)
            kept = len(np.intersect1d(rule.choose(other), chosen)) / len(chosen)
            row = pairs.valid[member]
            moved = float(np.abs(other[:, v] - table[:, v]).max())
            without.append(WithoutOne(row.id, row.set_name, kept, moved))
    return sorted(without, key=lambda one: (one.kept, -one.moved, one.set, one.id))
