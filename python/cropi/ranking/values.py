"""What prompts are ranked by: one value a prompt, from its scores for the validation sets, or from a baseline."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cropi.errors import CropiError, optional

FROM_SCORES = ("rrf", "rrf_classic", "max", "mean")  # what a table of scores alone decides
BY_REWARDS = ("learnability", "pass_rate")  # baselines that rank by pass rates
STRIDE = 64
# What messages say where scores that are not resampled lack something.
SCORE_AGAIN = "score again with --draws 200 (draws=200) and two validation prompts a set at least"


def again_for_chances(meta: Mapping[str, Any]) -> str:
    """What messages say where the scores of a table's ``meta`` hold no ``p_selected``."""
    if meta.get("uncertainty"):
        return "score again by a method that is no baseline"
    return SCORE_AGAIN


def no_score(method: str) -> str:
    """Why a choice by a baseline has no draws."""
    return f"a choice by {method}, which looks at no score, so that no draw of validation prompts changes it"


def fuse_ranks(
    table: np.ndarray, ids: Sequence[str] | np.ndarray, n: int | None = None, constant: float = 0.0
) -> np.ndarray:
    """Reciprocal rank fusion, float64 ``[prompts]`` from scores ``[prompts, sets]``.

        fused(s) = sum over sets v with rank_v(s) <= n of  1 / (constant + rank_v(s)),      rank_v = 1, 2, ...

    CROPI's released code has constant 0 and cuts each list at the n prompts that are chosen; the fusion of Cormack,
    Clarke and Buettcher (SIGIR 2009) has constant 60 and whole lists.

    Args:
        table: the scores.
        ids: these settle ties; :func:`ranks_of` them may be given in their place, to sort them once for many tables.
        n: where each list is cut; None takes all of it.
        constant: at least 0.
    """
    if table.ndim != 2 or len(table) != len(ids):
        raise CropiError(f"table has shape {list(table.shape)}: give [{len(ids)}, sets], a row per id")
    ties = ids if isinstance(ids, np.ndarray) else ranks_of(ids)
    fused = np.zeros(len(ids))
    for column in table.T:
        best = _ranked(column, ties, len(column) if n is None else n)
        fused[best] += 1.0 / (constant + np.arange(1, len(best) + 1))
    return fused


def ranks_of(names: Sequence[str]) -> np.ndarray:
    """The place of every name in sorted order, int64 ``[n]``: what settles ties, as one number a prompt."""
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.argsort(np.array(names, dtype=object), kind="stable")] = np.arange(len(names))
    return ranks


def check_from_scores(method: str) -> None:
    """Check that a method of selection is one of :data:`FROM_SCORES`.

    Raises:
        CropiError: it is not.
    """
    if method not in FROM_SCORES:
        raise CropiError(
            f"method must be one of {', '.join(FROM_SCORES)}, got {method!r}: others do not depend on the validation "
            "prompts"
        )


def order_of(value: np.ndarray, beyond: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """The order of selection, int64 ``[n]``: the highest ``value``, then the highest ``beyond``, then ``ties``."""
    return np.lexsort((ties, -beyond, -value))


def best_of(value: np.ndarray, ties: np.ndarray, n: int) -> np.ndarray:
    """The first ``n`` of :func:`order_of` in any order, int64, without sorting, where ``beyond`` is the same for all;
    no value is a NaN."""
    if n >= len(value):
        return np.arange(len(value))
    some = _above(value, n)
    held = value[some]
    cut = np.partition(held, len(held) - n)[len(held) - n]
    sure, equal = some[held > cut], some[held == cut]
    if len(left := equal) > n - len(sure):
        left = equal[np.argsort(ties[equal], kind="stable")[: n - len(sure)]]
    return np.concatenate([sure, left])


def _above(value: np.ndarray, n: int) -> np.ndarray:
    """Places with at least the ``n`` highest values and, as a rule, few others: those above a bound that a sample of
    the values suggests."""
    sample = value[::STRIDE]
    place = n / STRIDE + 4 * math.sqrt(n / STRIDE) + 4  # four standard deviations below the n-th
    if place < len(sample) / 2:
        bound = np.partition(sample, len(sample) - 1 - int(place))[len(sample) - 1 - int(place)]
        some = np.flatnonzero(value >= bound)
        if len(some) >= n:
            return some
    return np.arange(len(value))


def _ranked(column: np.ndarray, ties: np.ndarray, n: int) -> np.ndarray:
    """The first ``n`` places by value and then by ties, int64."""
    some = _above(column, n)
    values = -column[some]
    order = np.argsort(values)
    held = values[order[: n + 1]]
    if (held[1:] == held[:-1]).any():
        order = np.lexsort((ties[some], values))
    return some[order[:n]]


def value_of(
    table: np.ndarray, ties: np.ndarray, n: int, method: str, constant: float
) -> tuple[np.ndarray, np.ndarray]:
    """The value that a method of :data:`FROM_SCORES` ranks by, and what orders equal values: float64 ``[prompts]``
    each.

    Outside of every list that CROPI's fusion cuts all values are 0; the highest score keeps that end in a meaningful
    order.
    """
    best, value = table.max(axis=1), counted(table, ties, n, method, constant)
    if method == "rrf":
        best[value != 0] = 0.0
        return value, best
    return (value / table.shape[1] if method == "mean" else value), np.zeros(len(best))


def counted(
    table: np.ndarray,
    ties: np.ndarray,
    n: int,
    method: str,
    constant: float,
    beside: np.ndarray | None = None,
) -> np.ndarray:
    """What a method of :data:`FROM_SCORES` chooses by, float64 ``[prompts]``: fused ranks, the highest score, or the
    sum of the scores. ``beside`` is the same of further columns."""
    if method == "max":
        value = table.max(axis=1, initial=-math.inf)
        return value if beside is None else np.maximum(value, beside)
    if method == "mean":
        value = table.sum(axis=1)
    elif method == "rrf":
        value = fuse_ranks(table, ties, n)
    else:
        value = fuse_ranks(table, ties, None, constant)
    return value if beside is None else value + beside


def check_rewards(method: str, estimator: Mapping[str, Any]) -> None:
    """Refuse a baseline of rewards for demonstrations, which all count as solved: it would choose at random.

    Args:
        method: of the selection.
        estimator: its settings (:meth:`cropi.Estimator.to_dict`), as far as they are known.

    Raises:
        CropiError: see above.
    """
    if method in BY_REWARDS and estimator.get("centred") is False:
        raise CropiError(
            f"method {method!r} ranks by rewards, and the estimator {estimator.get('name')!r} takes demonstrations, "
            "which have none; name another --method"
        )


def baseline(method: str, rates: np.ndarray) -> np.ndarray:
    """The value of a baseline from pass rates: "random" (all equal), "learnability" (p (1 - p)), "pass_rate" (p)."""
    if method == "random":
        return np.zeros(len(rates))
    # Rounded: 0.2 * 0.8 and 0.8 * (1 - 0.8) differ in their last bit, and the harder prompt would always win.
    return np.round(rates * (1 - rates), 12) if method == "learnability" else rates


def students_quantile(level: float, degrees: Sequence[float]) -> np.ndarray:
    """The quantile of Student's t with so many degrees of freedom, float64 ``[len(degrees)]``; NaN of NaN."""
    # Not scipy.stats: its import alone takes as much memory as the scores of a million prompts.
    quantiles: np.ndarray = optional("scipy.special").stdtrit(np.array(degrees, dtype=np.float64), level)
    return quantiles


def drawn_ties(ids: Sequence[str], seed: int) -> np.ndarray:
    """Ties in an order that a seed draws, int64 ``[n]``: pass rates take few values, and among equal ones the order
    must not follow the names of the tasks."""
    return ranks_of([hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in ids])
