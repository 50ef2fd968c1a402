"""A contrast set: a training prompt whose gradient is similar to its prompts' gets a lower score.

score[s, v] - weight * score[s, contrast]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cropi.errors import CropiError, did_you_mean


def names_without(sets: Sequence[str], minus: str | None) -> list[str]:
    """The sets that are ranked by: all but the contrast.

    Raises:
        CropiError: no set has this name, or there is no set besides it.
    """
    if minus is None:
        return list(sets)
    if minus not in sets:
        raise CropiError(
            f"minus: there is no validation set {minus!r}; {did_you_mean(minus, sets)}there are "
            f"{', '.join(map(repr, sets))}"
        )
    if len(sets) == 1:
        raise CropiError(f"minus: {minus!r} is the only validation set; give one to select for, too")
    return [name for name in sets if name != minus]


def without(table: np.ndarray, sets: Sequence[str], minus: str | None, weight: float) -> np.ndarray:
    """The columns of the other sets, less ``weight`` times the contrast's, float64 ``[n, sets - 1]``."""
    if minus is None:
        return table
    others = [v for v, name in enumerate(sets) if name != minus]
    return np.asarray(table[:, others] - weight * table[:, [list(sets).index(minus)]])
