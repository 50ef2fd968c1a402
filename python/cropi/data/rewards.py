"""Group-normalised advantages, and which prompts have none.

Everything here sees a whole prompt group at once, so nothing depends on how its responses are batched later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A response counts as passed from this reward on; for the usual 0/1 rewards the pass rate is the mean reward.
PASS_REWARD = 0.5
# Of sums of a few parts, relative to the largest. Trainers sum in float32: eight units in its last place, 1e-6.
ROUNDING = 8 * float(np.finfo(np.float32).eps)
# Beyond it, squares and float32 weights would overflow.
LARGEST_REWARD = 1e30


def group_advantages(rewards: Sequence[float], *, std: bool = True, eps: float = 1e-4) -> np.ndarray:
    """Advantages of the K responses of one prompt: float64 ``[K]``.

    ``std=True``:  A_k = (R_k - mean) / (sd + eps), with the unbiased sd (divided by K - 1), as CROPI and GRPO
    do. ``std=False``: A_k = R_k - mean, as in Dr. GRPO (arXiv 2503.20783), which does not favour prompts of
    small spread.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite or beyond :data:`LARGEST_REWARD`.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"rewards: at least two are needed for an advantage, got {values.size}")
    if not (np.abs(values) <= LARGEST_REWARD).all():
        raise ValueError(
            f"rewards: {list(rewards)}: their size must be at most {LARGEST_REWARD:g}; scale them down"
        )
    centred = values - values.mean()
    return centred / (values.std(ddof=1) + eps) if std else centred


def no_gradient_reason(rewards: Sequence[float]) -> str | None:
    """Why a prompt has no gradient (every advantage is zero, but for rounding), or None when it has one.

    0.1 + 0.6 and 0.2 + 0.5 are equal rewards: their advantages would be noise, and a cosine sees no size.
    """
    if len(rewards) < 2:
        return "one response"
    low, high = min(rewards), max(rewards)
    return "equal rewards" if high - low <= ROUNDING * max(abs(low), abs(high)) else None


def pass_rate(rewards: Sequence[float]) -> float:
    """Share of the responses whose reward is at least :data:`PASS_REWARD`."""
    return float(np.mean(np.asarray(rewards, dtype=np.float64) >= PASS_REWARD))
