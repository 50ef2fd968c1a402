"""The part of a score's noise that comes from the finite number of responses, computed from stores of noise.

A store of noise (``cropi sketch --noise``) holds, for every prompt, a vector d whose covariance is that of its gradient
g over other responses (:mod:`cropi.gradient.noise`). To first order in the noise, with the weights w_i of the
validation prompts (1/V, or 1/(V |g_i|)), their mean m and the direction u = g / |g| of a training prompt ::

    of the validation responses    var c = sum_i w_i^2 <u, (I - m m'/|m|^2) d_i>^2 / |m|^2
    of the prompt's own responses  var c = <(I - u u') d, m>^2 / (|g| |m|)^2

The first is a part of the standard error of resampled validation prompts, whose gradients carry it already; the second
comes to it. One d a prompt gives the second one degree of freedom: it is averaged over the training prompts that have
one. The same d give the share |d|^2 / |g|^2 of a gradient's squared length that is noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cropi.errors import CropiError, shown
from cropi.form import nested
from cropi.gradient.zero import ZERO_GRADIENT
from cropi.options import Influence
from cropi.ranking.members import check_stores, choose_members, validation_means
from cropi.ranking.products import in_order
from cropi.store.differences import ALIKE, Difference, first_difference
from cropi.store.manifest import MERGED, NOISE, NOTES
from cropi.store.rows import OK
from cropi.store.store import SketchStore

MOST = 1024  # training prompts whose noise is looked at: their gradients are in memory
# What a store of noise may differ in from that of the gradients.
_FREE = (*NOTES, NOISE, "dtype", "zero_check")


@dataclass(frozen=True)
class ResponseNoise:
    """For the training prompts in order of id and the validation sets in theirs.

    ``valid`` float64 ``[n, sets]``: the part of every score's variance that comes from the validation prompts'
    responses; NaN where no validation prompt of the set has noise. ``own`` float64 ``[m, sets]``: what other responses
    of their own would have moved the scores of m training prompts by. ``share``: the mean of |d|^2 / |g|^2 over these;
    NaN without any.
    """

    sets: list[str]
    valid: np.ndarray
    own: np.ndarray
    share: float


def response_noise(
    train: SketchStore,
    valid: Sequence[SketchStore],
    noise: Sequence[SketchStore],
    comparing: Influence | None = None,
) -> ResponseNoise:
    """The noise of all scores that comes from responses.

    Args:
        train: the store of training prompts.
        valid: stores of validation prompts.
        noise: stores of noise, of some or all of these.
        comparing: how scores are made; None: the defaults. They are against means (``aggregate``), of single sets
            (``minus`` is taken off later).

    Raises:
        CropiError: stores that cannot be compared, or one of noise that belongs to none of them.
    """
    given = comparing or Influence()
    check_stores(train, valid)
    of_train: list[SketchStore] = []
    of_valid: list[list[SketchStore]] = [[] for _ in valid]
    for store in noise:
        place = _place(store, [train, *valid])
        (of_train if place == 0 else of_valid[place - 1]).append(store)
    means = validation_means(valid, given)
    moved, counts = _of_valid(valid, of_valid, means, given)
    own, share = _own(train, of_train, means, given.metric)
    return ResponseNoise(list(means), _variances(train, moved, counts, given.metric), own, share)


def _of_valid(
    valid: Sequence[SketchStore],
    noise: Sequence[Sequence[SketchStore]],
    means: Mapping[str, torch.Tensor],
    given: Influence,
) -> tuple[dict[str, list[torch.Tensor]], dict[str, int]]:
    """For every set: what each validation prompt's noise adds to a direction's score, as vectors float64 ``[dim]``; and
    how many of its prompts have noise, those among them whose noise is zero."""
    members = choose_members(valid, given.max_valid, given.valid_seed)
    moved: dict[str, list[torch.Tensor]] = {name: [] for name in means}
    counts = dict.fromkeys(means, 0)
    for number, (store, parts) in enumerate(zip(valid, noise, strict=True)):
        drawn = _noise_of(parts)
        for rows, table in store.shards() if drawn else ():
            for row, gradient in zip(rows, table.double(), strict=True):
                name = row.set_name
                if row.id not in drawn or (number, row.id) not in members.get(name, ()):
                    continue
                counts[name] += 1
                if (vector := drawn[row.id]) is None:
                    continue
                if given.mean == "normalised":
                    vector = _without(vector, gradient) / gradient.norm()
                if given.metric == "cosine":
                    vector = _without(vector, means[name]) / means[name].norm()
                moved[name].append(vector / len(members[name]))
    # Those that have none stand for as much as those that have.
    for name, vectors in moved.items():
        moved[name] = [vector * (len(members[name]) / counts[name]) ** 0.5 for vector in vectors]
    return moved, counts


def _variances(
    train: SketchStore, moved: Mapping[str, list[torch.Tensor]], counts: Mapping[str, int], metric: str
) -> np.ndarray:
    ends = np.cumsum([0, *(len(vectors) for vectors in moved.values())])
    known = np.where([counts[name] > 0 for name in moved], 0.0, np.nan)
    vectors = [vector for part in moved.values() for vector in part] or [
        torch.zeros(train.dim, dtype=torch.float32, device="cpu")
    ]

    def sums(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            squares = np.square(products / lengths[:, None] if metric == "cosine" else products)
        parts = [squares[:, a:b].sum(axis=1) for a, b in zip(ends, ends[1:])]
        return np.asarray(np.stack(parts, axis=1) + known)

    return in_order(train, torch.stack(vectors), sums, len(moved))[1]


def _own(
    train: SketchStore, noise: Sequence[SketchStore], means: Mapping[str, torch.Tensor], metric: str
) -> tuple[np.ndarray, float]:
    """How far other responses of a training prompt would move its own scores.

    Returns:
        The moves, float64 ``[m, sets]``, of the m prompts that have noise; and the noise's share of the squared lengths
        of their gradients.
    """
    usable = {row.id for row in train.rows() if row.status == OK}
    drawn = _noise_of(noise, usable)
    lengths = [float(m.norm()) if metric == "cosine" else 1.0 for m in means.values()]
    moved: dict[str, list[float]] = {}
    shares: dict[str, float] = {}
    for rows, table in train.shards() if drawn else ():
        for row, gradient in zip(rows, table, strict=True):
            if row.id not in drawn:
                continue
            vector, gradient = drawn[row.id], gradient.double()
            size = float(gradient.norm())
            if vector is None or not size:
                moved[row.id], shares[row.id] = [0.0] * len(means), 0.0
                continue
            shares[row.id] = float(vector.norm()) ** 2 / size**2
            if metric == "cosine":
                vector = _without(vector, gradient) / size
            moved[row.id] = [
                float(vector @ m) / length for m, length in zip(means.values(), lengths, strict=True)
            ]
    # By id, as the draws below: stores in another order would give other chances of being chosen.
    ids = sorted(moved)
    own = np.array([moved[name] for name in ids]).reshape(len(ids), len(means))
    return own, float(np.mean([shares[name] for name in ids])) if ids else float("nan")


def _noise_of(
    stores: Sequence[SketchStore], usable: set[str] | None = None
) -> dict[str, torch.Tensor | None]:
    """The noise of each prompt by its id, float64 ``[dim]``, None where it is zero. With ``usable``: of at most
    :data:`MOST` of these, drawn."""
    ids = sorted(
        row.id
        for store in stores
        for row in store.rows()
        if (row.status == OK or row.reason == ZERO_GRADIENT) and (usable is None or row.id in usable)
    )
    if usable is not None and len(ids) > MOST:
        ids = [ids[i] for i in np.random.default_rng(0).choice(len(ids), MOST, replace=False)]
    by_id: dict[str, torch.Tensor | None] = dict.fromkeys(ids)
    for store in stores:
        for rows, table in store.shards():
            by_id.update(
                (row.id, vector.double()) for row, vector in zip(rows, table, strict=True) if row.id in by_id
            )
    return by_id


def _without(vector: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The vector less its part along a direction."""
    return vector - direction * (vector @ direction / (direction @ direction))


def _place(noise: SketchStore, stores: Sequence[SketchStore]) -> int:
    """Which of some stores of gradients a store of noise belongs to.

    Raises:
        CropiError: none of them, and why; or it holds gradients itself.
    """
    noise.check_finished(alone=False)  # a share of its prompts is some of them
    if not noise.manifest.get(NOISE):
        raise CropiError(
            f"noise: {noise.path} holds gradients; give stores that `cropi sketch --noise` made of the same "
            "trajectories"
        )
    reason = ""
    for number, store in enumerate(stores):
        for manifest in store.joined or [store.manifest]:
            differs = _difference(manifest, noise.manifest)
            if differs is None:
                return number
            if differs.field != "trajectories" or not reason:
                reason = (
                    f"{differs.field} = {shown(differs.left)} in {store.path}, {shown(differs.right)} in it"
                )
    raise CropiError(
        f"noise: {noise.path} belongs to none of the stores of training and validation prompts ({reason}); sketch it "
        "from the same trajectories with the same settings"
    )


def _difference(store: Mapping[str, Any], noise: Mapping[str, Any]) -> Difference | None:
    """Where the jobs of a store and of one of noise differ; a merged one holds the trajectories of several."""
    if MERGED in store or MERGED in noise:
        held, drawn = (one.get(MERGED, [one.get("trajectories")]) for one in (store, noise))
        if any(one not in held for one in drawn):
            return Difference("trajectories", held, drawn)
        fields = ("spec", "stage", "model", "parameters", *ALIKE)
        left, right = ({field: nested(one, field) for field in fields} for one in (store, noise))
        return first_difference(left, right)
    left, right = ({k: v for k, v in one.items() if k not in _FREE} for one in (dict(store), dict(noise)))
    return first_difference(left, right)
