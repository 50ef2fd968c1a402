"""Responses that are equal token by token: computed once, with the sum of their weights.

Short answers are often sampled twice. Their log-prob gradients are the same, so that K equal responses need one row
and one weight a token, ``sum_k w_k``. That is less work, and exact where advantages cancel: if the model computed
every response by itself and the gradients were added afterwards, rounding errors would be left, and a cosine does not
tell small vectors from large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cropi.data.rewards import ROUNDING


def equal_responses(
    responses: Sequence[Sequence[int]], masks: Sequence[Sequence[int]] | None = None
) -> list[tuple[int, ...]]:
    """Numbers of the responses that are equal to each other, in the order of their first one.

    >>> equal_responses([[5, 1], [7], [5, 1], [8]])
    [(0, 2), (1,), (3,)]

    Args:
        responses: token ids.
        masks: which of them are scored; equal tokens of which others are scored are not equal. None: all are.
    """
    members_of: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for k, ids in enumerate(responses):
        key = (tuple(ids),) if masks is None else (tuple(ids), tuple(masks[k]))
        members_of.setdefault(key, []).append(k)
    return [tuple(members) for members in members_of.values()]


def sum_of_equals(each: torch.Tensor) -> torch.Tensor:
    """The weights ``[n]`` of tokens that stand for several, from the weights of each, ``[n, R]``.

    Zero where the sum is rounding: below :data:`cropi.data.rewards.ROUNDING` of the sum of sizes. A weight comes from
    float32 advantages, divisors and ratios, each rounded once, so that no sum is known better.
    """
    each = each.double()
    total = torch.zeros_like(each[:, 0])
    for k in range(each.shape[1]):  # in this order on every device
        total = total + each[:, k]
    noise = (each != 0).sum(dim=1).gt(1) & (total.abs() <= ROUNDING * each.abs().sum(dim=1))
    return torch.where(noise, 0.0, total)


def all_cancel(weights: Sequence[float], equal: Sequence[Sequence[int]]) -> bool:
    """Whether the weights of equal responses add up to nothing, for each of them: the gradient is zero by algebra.

    >>> all_cancel([0.5, -0.5, 0.1, -0.1], [(0, 1), (2, 3)]), all_cancel([0.5, -0.5, 0.1, -0.1], [(0, 2), (1, 3)])
    (True, False)

    Args:
        weights: ``A_k / d_k``, of every response. That is the weight of all its tokens where the ratio is 1, and a
            common factor of it where equal responses have equal ratios.
        equal: see :func:`equal_responses`.
    """
    values = np.asarray(weights, dtype=np.float64)
    return all(abs(values[list(k)].sum()) <= ROUNDING * np.abs(values[list(k)]).sum() for k in equal)
