"""What the rewards of one prompt say: whether it has a gradient, and how often it is solved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A response counts as passed from this reward on; for the usual 0/1 rewards the pass rate is the mean reward.
PASS_REWARD = 0.5
# Of sums of a few parts, relative to the largest. Trainers sum in float32: eight units in its last place, 1e-6.
ROUNDING = 8 * float(np.finfo(np.float32).eps)
# Beyond it, squares and float32 weights would overflow.
LARGEST_REWARD = 1e30
ONE_RESPONSE, EQUAL_REWARDS = "one response", "equal rewards"
# What is said where no prompt has more than one.
IDS_OF_RESPONSES = (
    "where the ids are those of responses, give the prompts': records leave them out with --columns id=, and of a "
    "trainer's dump `cropi convert --id-key NAME` takes others"
)


def final_answer(solution: str) -> str:
    """What a solution that ends in ``#### 42`` (GSM8K) gives as its answer; any other text as it is.

    >>> final_answer("6 * 7 = 42\\n#### 42"), final_answer("x > 1")
    ('42', 'x > 1')
    """
    last = solution.rpartition("####")[2].strip()
    return last if last and "\n" not in last else solution.strip()


def no_gradient_reason(rewards: Sequence[float]) -> str | None:
    """Why a prompt has no gradient (every advantage is zero, but for rounding), or None when it has one.

    0.1 + 0.6 and 0.2 + 0.5 are equal rewards: their advantages would be noise, and a cosine sees no size.
    """
    if len(rewards) < 2:
        return ONE_RESPONSE
    low, high = min(rewards), max(rewards)
    return EQUAL_REWARDS if high - low <= ROUNDING * max(abs(low), abs(high)) else None


def pass_rate(rewards: Sequence[float]) -> float:
    """Share of the responses whose reward is at least :data:`PASS_REWARD`."""
    return float(np.mean(np.asarray(rewards, dtype=np.float64) >= PASS_REWARD))
