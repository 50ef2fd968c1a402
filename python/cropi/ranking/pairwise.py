"""Inner products of every training prompt's sketch with every validation prompt's.

    dots[s, i] = <S g(s), S g(i)>        gram[i, j] = <S g(i), S g(j)>

Everything that resamples, weighs or leaves out validation prompts follows from these two tables: the mean of any subset
with weights w has the dot product ``dots @ w`` and the squared norm ``w' gram w``. So uncertainty and neighbours need
the stores alone, and no model. The training store is streamed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi.checked import fits
from cropi.data.rows_out import write_jsonl
from cropi.errors import CropiError
from cropi.ranking.given import given_stores
from cropi.ranking.members import SAME_LENGTH, check_stores, none_usable, validation
from cropi.ranking.products import in_order
from cropi.sealed import summed
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore
from cropi.store.unit import unit_rows

TOGETHER = 1024  # validation prompts that `neighbours` compares with a block of rows at one time


@dataclass(frozen=True)
class Pairwise:
    """Inner products between prompts.

    ``rows``: the training prompts by id; ``valid``: the usable validation prompts, by set and id. ``dots`` ``[n, V]``,
    float32 (float64 where their size would leave it), NaN for a training prompt without a sketch; ``norms`` float64
    ``[n]``; ``gram`` float64 ``[V, V]``.
    """

    rows: list[RowInfo]
    valid: list[RowInfo]
    dots: np.ndarray
    norms: np.ndarray
    gram: np.ndarray

    @property
    def sets(self) -> list[str]:
        """The names of the validation sets, sorted."""
        return sorted({row.set_name for row in self.valid})

    def members(self, name: str) -> np.ndarray:
        """The columns of one validation set, int64 ``[V_set]``."""
        return np.flatnonzero([row.set_name == name for row in self.valid])

    @property
    def cosines(self) -> np.ndarray:
        """float64 ``[n, V]``: the cosine of every training prompt with every validation prompt."""
        lengths = np.sqrt(np.diagonal(self.gram))
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.dots / self.norms[:, None] / lengths

    @property
    def usable(self) -> np.ndarray:
        """The training prompts with a score, int64."""
        places: np.ndarray = np.flatnonzero(np.isfinite(self.dots).all(axis=1) & np.isfinite(self.norms))
        return places

    def weights(self, members: np.ndarray, mean: str = "plain") -> np.ndarray:
        """The weight of each member in its set's mean, float64: ``1 / V``, or ``1 / (V |g_i|)`` if normalised."""
        lengths = np.sqrt(np.diagonal(self.gram))[members] if mean == "normalised" else np.ones(len(members))
        return 1.0 / lengths / len(members)


def copies(pairs: Pairwise) -> tuple[dict[str, tuple[int, int]], tuple[str, str]] | None:
    """What :func:`cropi.data.twice.repeated_prompts` finds in records, of stores: prompts whose responses and gradient
    are those of another one of their set. Other responses to the same prompt have another gradient, and are not found.
    """
    squares, found = np.diagonal(pairs.gram), dict[str, tuple[int, int]]()
    example: tuple[str, str] | None = None
    for name in pairs.sets:
        members, again = pairs.members(name), 0
        alike: dict[tuple[int, float], list[int]] = {}
        for i in members.tolist():
            alike.setdefault((pairs.valid[i].tokens, pairs.valid[i].pass_rate), []).append(i)
        for places in map(np.array, alike.values()):
            for number, i in enumerate(places):
                before = places[:number]
                apart = squares[before] + squares[i] - 2 * pairs.gram[i, before]
                same = before[(apart <= SAME_LENGTH**2 * squares[i]) & (squares[i] > 0)]
                if len(same):
                    again += 1
                    example = example or (pairs.valid[same[0]].id, pairs.valid[i].id)
        if again:
            found[name] = again, len(members)
    return example and (found, example)


def _check(train: SketchStore, valid: Sequence[SketchStore]) -> None:
    if not valid:
        raise CropiError("valid is empty: give at least one store of validation prompts")
    for store in valid:
        store.check_finished()
    check_stores(train, valid)


def pairwise(
    train: SketchStore, valid: Sequence[SketchStore], *, max_valid: int | None = None, seed: int = 0
) -> Pairwise:
    """All inner products between training and validation prompts.

    Memory: ``4 n V`` bytes and a few blocks of rows. Errors are those of :func:`cropi.ranking.products.products`, far
    under the sketch's own.

    Args:
        train: the store of training prompts.
        valid: stores of validation prompts.
        max_valid, seed: the validation prompts that count, as in :class:`cropi.options.Influence`.

    Raises:
        CropiError: stores that cannot be compared, an unfinished one, or no usable validation prompt.
    """
    _check(train, valid)
    names, sketches = validation(valid, max_valid, seed)
    rows, norms, dots = in_order(train, sketches, lambda dots, norms: norms[:, None], 1, len(names))
    return made(rows, names, sketches, dots, norms[:, 0])


def made(
    rows: list[RowInfo], valid: list[RowInfo], sketches: torch.Tensor, dots: np.ndarray, norms: np.ndarray
) -> Pairwise:
    """The products and lengths that were streamed, with those between the validation prompts."""
    norms[norms == 0] = np.nan  # a zero sketch has no direction
    gram = (sketches.double() @ sketches.double().T).numpy()
    return Pairwise(rows, valid, dots, norms, gram)


def nearest_scores(
    rows: Sequence[RowInfo], sketches: torch.Tensor, metric: str
) -> tuple[list[str], Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """The names of the validation sets, and a function of products ``[n, V]`` with the validation prompts and lengths
    ``[n]``: the highest cosine (or dot product) of each row with a prompt of each set, float64 ``[n, sets]``."""
    names = np.array([row.set_name for row in rows], dtype=object)
    sets = sorted(set(names))
    members = [np.flatnonzero(names == name) for name in sets]
    norms = torch.linalg.vector_norm(sketches.double(), dim=1).numpy() if metric == "cosine" else 1.0

    def score(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        values = products[:, products.shape[1] - len(rows) :] / norms
        best = np.stack([values[:, one].max(axis=1) for one in members], axis=1)
        return best / lengths[:, None] if metric == "cosine" else best

    return sets, score


@dataclass(frozen=True)
class Neighbour:
    """A training prompt near a validation prompt, or opposed to it, with the cosine of their gradients."""

    id: str
    cosine: float


def neighbours(
    train: Any,
    valid: Any,
    k: int = 5,
    *,
    ids: Sequence[str] | None = None,
) -> dict[str, tuple[list[Neighbour], list[Neighbour]]]:
    """For each validation prompt the ``k`` training prompts with the highest and the ``k`` with the lowest cosine.

    Exact, over every row of the store, in memory for ``k`` rows a validation prompt and one shard: the store may be
    larger than memory. Equal cosines are ordered by id.

    Args:
        train: the training prompts: a store, or sketches in memory, as for :func:`cropi.influence`.
        valid: the validation prompts, likewise.
        k: how many, at least 1.
        ids: the validation prompts that are wanted; None takes all.

    Returns:
        ``{validation id: (helpful, harmful)}``, best and worst first.

    Raises:
        CropiError: ``k`` below 1, ``ids`` that are one string, an id that no validation store holds, no training prompt
            with a usable sketch, or what :func:`pairwise` raises.

    >>> from cropi.store.memory import MemoryStore
    >>> train, valid = (MemoryStore({"spec": {"dim": 64}}) for _ in range(2))
    >>> for name, vector in (("a", torch.ones(64)), ("b", -torch.ones(64))):
    ...     _ = train.add(RowInfo(name), vector)
    >>> _ = valid.add(RowInfo("v", set="sums"), torch.ones(64))
    >>> train.finish(), valid.finish()
    (None, None)
    >>> neighbours(train, valid, 1)["v"]
    ([Neighbour(id='a', cosine=1.0)], [Neighbour(id='b', cosine=-1.0)])
    """
    if not fits(k, int) or k < 1:
        raise CropiError(f"k must be an integer of at least 1, got {k!r}")
    if isinstance(ids, str):
        raise CropiError(f"ids must be a list of prompt ids, got {ids!r}; for one, write [{ids!r}]")
    train, stores = given_stores(train, valid)
    _check(train, stores)
    rows, sketches = validation(stores, ids=None if ids is None else set(ids))
    if ids is not None:
        place = {row.id: i for i, row in enumerate(rows)}
        missing = [name for name in ids if name not in place]
        if missing:
            raise CropiError(
                f"ids: {missing[0]!r} is not a usable validation prompt of these stores; leave it out"
            )
        rows, sketches = [rows[place[name]] for name in ids], sketches[[place[name] for name in ids]]
    directions = unit_rows(sketches).T
    best: list[list[tuple[float, str]]] = [[] for _ in rows]
    worst: list[list[tuple[float, str]]] = [[] for _ in rows]
    for kept, table in train.shards():
        unit = unit_rows(table)
        for begin in range(0, len(rows), TOGETHER):
            cosines = unit @ directions[:, begin : begin + TOGETHER]
            for column, values in enumerate(cosines.T, begin):
                best[column] = _highest(k, best[column], values, kept)
                worst[column] = _highest(k, worst[column], -values, kept)
    if rows and not best[0]:
        raise none_usable(train)
    return {
        row.id: (
            [Neighbour(name, -value) for value, name in best[i]],
            [Neighbour(name, value) for value, name in worst[i]],
        )
        for i, row in enumerate(rows)
    }


def write_neighbours(
    path: str | Path,
    found: Mapping[str, tuple[list[Neighbour], list[Neighbour]]],
    valid: Sequence[SketchStore],
) -> None:
    """Write what :func:`neighbours` gave as JSON lines, one a validation prompt: ``id``, ``set``, ``helpful`` and
    ``harmful``, lists of ``id`` and ``cosine``."""
    sets = {row.id: row.set_name for store in valid for row in store.rows()}
    rows = [
        {"id": name, "set": sets[name], "helpful": list(map(asdict, near)), "harmful": list(map(asdict, far))}
        for name, (near, far) in found.items()
    ]
    with summed(path):
        write_jsonl(Path(path), rows)


def _highest(
    k: int, before: list[tuple[float, str]], values: torch.Tensor, rows: Sequence[RowInfo]
) -> list[tuple[float, str]]:
    """The ``k`` highest values of some before and of a shard's rows: negated, with their ids, highest first."""
    # The k-th value and all that equal it, so that ties are settled by id and not by the shard's order.
    cut = torch.topk(values, min(k, len(rows))).values[-1]
    some = (values >= cut).nonzero().flatten().tolist()
    return heapq.nsmallest(k, before + [(-float(values[i]), rows[i].id) for i in some])
