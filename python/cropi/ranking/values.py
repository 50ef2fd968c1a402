"""What prompts are ranked by: one value a prompt, from its scores for the validation sets, or from a baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cropi.errors import CropiError

METHODS = ("rrf", "rrf_classic", "max", "mean", "p_selected", "random", "learnability", "pass_rate")
FROM_SCORES = ("rrf", "rrf_classic", "max", "mean")  # what a table of scores alone decides
RRF_CONSTANT = 60  # Cormack, Clarke, Buettcher 2009


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
        best = np.lexsort((ties, -column))[:n]
        fused[best] += 1.0 / (constant + np.arange(1, len(best) + 1))
    return fused


def ranks_of(names: Sequence[str]) -> np.ndarray:
    """The place of every name in sorted order, int64 ``[n]``: what settles ties, as one number a prompt."""
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.argsort(np.array(names, dtype=object), kind="stable")] = np.arange(len(names))
    return ranks


def order_of(value: np.ndarray, beyond: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """The order of selection, int64 ``[n]``: the highest ``value``, then the highest ``beyond``, then ``ties``."""
    return np.lexsort((ties, -beyond, -value))


def value_of(
    table: np.ndarray, ties: np.ndarray, n: int, method: str = "rrf", constant: float = RRF_CONSTANT
) -> tuple[np.ndarray, np.ndarray]:
    """The value that a method of :data:`FROM_SCORES` ranks by, and what orders equal values: float64 ``[prompts]``
    each.

    Outside of every list that CROPI's fusion cuts all values are 0; the highest score keeps that end in a meaningful
    order.
    """
    best = table.max(axis=1)
    if method == "rrf":
        fused = fuse_ranks(table, ties, n)
        return fused, np.where(fused == 0, best, 0.0)
    if method == "rrf_classic":
        return fuse_ranks(table, ties, None, constant), np.zeros(len(best))
    return (best if method == "max" else table.mean(axis=1)), np.zeros(len(best))


def baseline(method: str, rates: np.ndarray) -> np.ndarray:
    """The value of a baseline from pass rates: "random" (all equal), "learnability" (p (1 - p)), "pass_rate" (p)."""
    if method == "random":
        return np.zeros(len(rates))
    # Rounded: 0.2 * 0.8 and 0.8 * (1 - 0.8) differ in their last bit, and the harder prompt would always win.
    return np.round(rates * (1 - rates), 12) if method == "learnability" else rates


def drawn_ties(ids: Sequence[str], seed: int) -> np.ndarray:
    """Ties in an order that a seed draws, int64 ``[n]``: pass rates take few values, and among equal ones the order
    must not follow the names of the tasks."""
    return ranks_of([hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in ids])
