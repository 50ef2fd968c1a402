"""Choices that look at the sketches: near copies left out, and prompts whose gradients differ from one another.

Sketches keep inner products, so the cosine of two sketches estimates that of two gradients. All of this works on the
candidates alone, the best prompts by their value; their unit sketches are in memory, 2 bytes a number.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from cropi.errors import CropiError, optional
from cropi.store.store import SketchStore
from cropi.store.unit import unit_rows
from cropi_kernels import ProjectionSpec, project

BLOCK = 256  # rows compared at once
CLUSTERED_DIM = 1024  # numbers a prompt that k-means sees: more cost time and move no cluster
MOST_CANDIDATES = 30_000  # facility location keeps their cosines: 2 bytes a pair, 1.8 GB


def unit_sketches(
    store: SketchStore,
    ids: Sequence[str],
    dim: int | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> torch.Tensor:
    """The sketches of some prompts, each divided by its length, float16 ``[n, dim]``; the store is streamed once.

    Args:
        store: where they are.
        ids: of the prompts.
        dim, change: what ``change`` makes of some rows is kept in their place, float32 ``[n, dim]``.

    Raises:
        CropiError: the store has no sketch of one of them.
    """
    place = {name: i for i, name in enumerate(ids)}
    kind = torch.float16 if dim is None else torch.float32
    table, left = torch.zeros(len(ids), dim or store.dim, dtype=kind, device="cpu"), set(ids)
    for rows, sketches in store.shards():
        here = [i for i, row in enumerate(rows) if row.id in left]
        if not here:
            continue
        unit = unit_rows(sketches[here]).half()
        table[[place[rows[i].id] for i in here]] = change(unit)
        left -= {rows[i].id for i in here}
        if not left:
            break
    if left:
        raise CropiError(
            f"sketches: {store.path} holds no sketch of {len(left)} of the ranked prompts, for example "
            f"{min(left)!r:.100}; give the store that the scores were made from"
        )
    return table


class Distinct:
    """Goes down a ranking and leaves out every prompt that is too near to one taken before.

    Args:
        store: the sketches of the training prompts.
        bound: the highest cosine that two taken prompts may have.
    """

    def __init__(self, store: SketchStore, bound: float) -> None:
        self.store, self.bound = store, bound
        self.copies: dict[str, str] = {}  # what was left out, and the prompt it is near to
        self._ids: list[str] = []
        self._taken = torch.empty(0, store.dim, dtype=torch.float16, device="cpu")

    def take(self, ids: Sequence[str], n: int) -> list[int]:
        """The places of the first ``n`` prompts of a ranking that are far enough from one another and from those taken
        by earlier calls."""
        kept: list[int] = []
        for start, rows in self._blocks(ids, n):
            near = self._nearest(rows)
            among = _cosines(rows, rows).numpy()
            here: list[int] = []
            for i in range(len(rows)):
                name, (cosine, other) = ids[start + i], near[i]
                inside = max(((float(among[i, j]), ids[start + j]) for j in here), default=(-math.inf, ""))
                if max(cosine, inside[0]) > self.bound:
                    self.copies[name] = other if cosine >= inside[0] else inside[1]
                    continue
                here.append(i)
                if len(kept) + len(here) == n:
                    break
            kept += [start + i for i in here]
            self._ids += [ids[start + i] for i in here]
            self._taken = torch.cat([self._taken, rows[here]])
            if len(kept) == n:
                break
        return kept

    def _blocks(self, ids: Sequence[str], n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Sketches in order of the ranking; the store is streamed for n and a quarter at first, then for twice as
        many."""
        start, ahead = 0, n + n // 4 + BLOCK
        while start < len(ids):
            table = unit_sketches(self.store, ids[start : start + ahead])
            for first in range(0, len(table), BLOCK):
                yield start + first, table[first : first + BLOCK]
            start, ahead = start + ahead, 2 * ahead

    def _nearest(self, rows: torch.Tensor) -> list[tuple[float, str]]:
        best = torch.full((len(rows),), -math.inf, dtype=torch.float32, device="cpu")
        where = torch.zeros(len(rows), dtype=torch.long, device="cpu")
        for first in range(0, len(self._taken), 16 * BLOCK):
            cosines = _cosines(rows, self._taken[first : first + 16 * BLOCK])
            values, places = cosines.max(dim=1)
            where = torch.where(values > best, places + first, where)
            best = torch.maximum(best, values)
        return [
            (float(value), self._ids[place] if self._ids else "")
            for value, place in zip(best, where.tolist())
        ]


def _cosines(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """float32 ``[n, m]`` of unit sketches. Rounding to float16 moves their lengths off 1 by up to 5e-4, by which a copy
    would seem to be none."""
    a, b = rows.float(), others.float()
    return a @ b.T / (a.norm(dim=1)[:, None] * b.norm(dim=1))


def diverse_prompts(store: SketchStore, ids: Sequence[str], n: int, method: str, seed: int = 0) -> np.ndarray:
    """:func:`diverse` of some prompts of a store, of which k-means keeps no more numbers than it compares.

    Raises:
        CropiError: too many candidates for facility location, before a sketch is read; or as :func:`unit_sketches`.
    """
    if len(ids) <= n:
        return np.arange(len(ids))
    if method == "facility":
        _check_candidates(len(ids))
    elif store.dim > CLUSTERED_DIM:
        held = unit_sketches(store, ids, CLUSTERED_DIM, lambda rows: _narrow(rows, seed))
        return diverse(held, n, method, seed)
    return diverse(unit_sketches(store, ids), n, method, seed)


def diverse(sketches: torch.Tensor, n: int, method: str, seed: int = 0) -> np.ndarray:
    """The places of ``n`` rows, int64 in ascending order, whose directions differ.

    Args:
        sketches: the candidates' unit sketches ``[m, dim]``, best first.
        n: how many are chosen; all of them where there are fewer.
        method: "kmeans" or "facility".
        seed: of k-means.
    """
    if len(sketches) <= n:
        return np.arange(len(sketches))
    chosen = _by_clusters(sketches, n, seed) if method == "kmeans" else _facility_location(sketches, n)
    return np.sort(chosen)


def _by_clusters(sketches: torch.Tensor, n: int, seed: int) -> np.ndarray:
    """Choose ``n`` rows: the best one of each cluster, then the second best one of each, and so on."""
    small = _narrow(sketches, seed) if sketches.shape[1] > CLUSTERED_DIM else sketches.float()
    count = max(2, min(n, round(math.sqrt(len(sketches)))))
    means = optional("sklearn.cluster").KMeans(n_clusters=count, n_init=1, random_state=seed)
    labels = means.fit_predict(small.numpy())
    turn = np.zeros(len(labels), dtype=np.int64)
    for cluster in np.unique(labels):
        places = np.flatnonzero(labels == cluster)
        turn[places] = np.arange(len(places))
    return np.lexsort((np.arange(len(labels)), turn))[:n]


def _narrow(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Unit sketches of :data:`CLUSTERED_DIM` numbers, float32."""
    return unit_rows(project(rows.float(), ProjectionSpec(CLUSTERED_DIM, seed=seed)))


def _check_candidates(m: int) -> None:
    if m > MOST_CANDIDATES:
        raise CropiError(
            f"diversity: facility location keeps the cosines of all candidates, and {m} are more than "
            f"{MOST_CANDIDATES}; lower candidates, or use diversity kmeans"
        )


def _facility_location(sketches: torch.Tensor, n: int) -> np.ndarray:
    """Greedy maximum of  sum over candidates i of  max over chosen j of  max(cos(i, j), 0),  within 1 - 1/e of the best
    (Nemhauser, Wolsey, Fisher 1978); gains only fall, so that those at the top of a heap are worked out again alone
    (Minoux 1978)."""
    m = len(sketches)
    _check_candidates(m)
    near = torch.empty(m, m, dtype=torch.float16, device="cpu")
    for first in range(0, m, BLOCK):
        near[first : first + BLOCK] = (
            (sketches[first : first + BLOCK].float() @ sketches.float().T).clamp_min(0).half()
        )
    best = torch.zeros(m, dtype=torch.float32, device="cpu")
    heap = [(-float(gain), i) for i, gain in enumerate(near.sum(dim=1, dtype=torch.float32))]
    heapq.heapify(heap)
    chosen: list[int] = []
    fresh = np.zeros(m, dtype=np.int64)  # how many were chosen when a gain was worked out
    while len(chosen) < n:
        _, i = heap[0]
        if fresh[i] == len(chosen):
            heapq.heappop(heap)
            chosen.append(i)
            best = torch.maximum(best, near[i].float())
            continue
        fresh[i] = len(chosen)
        heapq.heapreplace(heap, (-float((near[i].float() - best).clamp_min(0).sum()), i))
    return np.array(chosen)
