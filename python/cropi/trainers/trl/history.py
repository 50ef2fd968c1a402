"""What TRL logged while it trained, in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def training_summary(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Reward and share of prompts with equal rewards at the beginning and at the end of a training.

    Args:
        history: what TRL logged, with ``step``, ``reward`` and ``frac_reward_zero_std``.

    Returns:
        ``reward`` and ``equal_rewards``, each ``[before, after]`` (means over the first and the last quarter of the
        entries, at least one of each), and ``steps``, the logged ones; None where no reward was logged.
    """
    seen = [entry for entry in history if _number(entry.get("reward"))]
    if not seen:
        return None
    size = max(1, len(seen) // 4)
    summary: dict[str, Any] = {"steps": [int(seen[0].get("step", 0)), int(seen[-1].get("step", 0))]}
    for name, key in (("reward", "reward"), ("equal_rewards", "frac_reward_zero_std")):
        ends = [[float(e[key]) for e in part if _number(e.get(key))] for part in (seen[:size], seen[-size:])]
        summary[name] = [sum(values) / len(values) if values else None for values in ends]
    return summary


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
