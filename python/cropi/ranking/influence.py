"""Influence: how similar a training prompt's gradient is in direction to the mean gradient of each validation set.

    score[s, v] = cos(S g(s), mean_{s' in v} S g(s'))        (or the dot product)

Sketches are linear and keep inner products, so the mean is taken over sketches. The training store is
streamed shard by shard. Method: arXiv 2510.26491.

A row of a store with groups of parameters is the groups' sketches side by side, ``x = (x_1, ..., x_G)``: a sketch of
the whole gradient too, with ``<x, m> = sum_g <x_g, m_g>`` and ``|x|^2 = sum_g |x_g|^2``. So the score is a sum over
groups, whose terms are the groups' *contributions*:

    contribution[s, v, g] = <x_g, m_g> / (|x| |m|)        (dot product: <x_g, m_g>)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cropi.data.rewards import EQUAL_REWARDS, ONE_RESPONSE
from cropi.errors import CropiError, article, warn
from cropi.option_fields import one_of
from cropi.options import Influence
from cropi.ranking.contrast import names_without, without
from cropi.ranking.products import in_order
from cropi.ranking.scores import DEFAULT_SET, Scores
from cropi.store.differences import check_comparable, check_scaled, warn_unlike
from cropi.store.manifest import NOISE
from cropi.store.rows import OK, RowInfo
from cropi.store.store import SketchStore

METRICS = ("cosine", "dot")
STAGES = ("same", "any")


def check_stores(train: SketchStore, valid: Sequence[SketchStore], stages: str = "same") -> None:
    """Check that a store of training prompts can be compared with validation stores; warn where it seems not meant.

    Args:
        train, valid: the stores.
        stages: see :func:`influence`.

    Raises:
        CropiError: the training store is unfinished, or two stores do not belong together.
    """
    train.check_finished()
    if train.manifest.get(NOISE):
        raise CropiError(
            f"{train.path} holds the noise of gradients (--noise), which has no influence: give it as noise, beside "
            "the stores of the gradients"
        )
    for store in valid:
        names = str(train.path), str(store.path)
        check_comparable(
            train.manifest, store.manifest, names, () if stages == "same" else ("stage", "model")
        )
        warn_unlike(train.manifest, store.manifest, names)
    check_scaled(
        train.manifest, [store.manifest for store in valid], [str(store.path) for store in (train, *valid)]
    )


def influence(
    train: SketchStore,
    valid: Sequence[SketchStore],
    comparing: Influence | None = None,
    *,
    pairs: bool = False,
    stages: str = "same",
    **options: Any,
) -> Scores:
    """Score every training prompt against every validation set.

    Stores that were made with another estimator, tokenizer, template, end token or temperature give a warning
    (:class:`cropi.store.differences.UnlikeStores`), and so do prompts that are on both sides (:class:`SharedPrompts`).

    Args:
        train: the store of training prompts.
        valid: stores of validation prompts; a set is the prompts with one ``set`` name, over all of them.
        comparing: the options; None: those that are given by keyword. ``minus``:
            ``score[s, v] - minus_weight * score[s, minus]``, a set that has no column of its own. ``draws`` is for the
            uncertainty (:mod:`cropi.ranking.uncertainty`), and not looked at.
        pairs: keep the inner products with every validation prompt as ``scores.pairs``
            (:class:`cropi.ranking.pairwise.Pairwise`): the training store is read once for both.
        stages: "same", or "any" to take training sketches of an earlier stage, whose policy was another: such scores
            only say what to sketch anew (:mod:`cropi.ranking.cut`).
        options: the fields of :class:`cropi.options.Influence`: ``metric="dot"``, ``mean="normalised"``, ...

    Returns:
        The scores; of stores with groups of parameters the groups' contributions too, but not with ``aggregate``
        "nearest".

    Raises:
        CropiError: stores that cannot be compared, an unfinished one, a validation set without a usable prompt,
            an unknown option.
    """
    given = one_of(comparing, options, Influence)
    minus, weight = given.minus, given.minus_weight
    if stages not in STAGES:
        raise CropiError(f"stages must be one of {', '.join(STAGES)}, got {stages!r}")
    for store in [train, *valid]:
        if not isinstance(store, SketchStore):
            raise CropiError(f"a SketchStore is needed, got {type(store).__name__}; score_rows takes tensors")
    check_stores(train, valid, stages)
    compared = _compared(valid, given, pairs)
    kept_sets, wanted = names_without(compared.sets, minus), len(compared.valid) if pairs else 0
    # The nearest prompt is another one for every row: its groups' products are not taken.
    count, groups = len(kept_sets), train.groups if given.aggregate == "mean" else []
    apart = len(compared.sets) if groups else 0

    def score(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        # Of all parameters, then of each group, whose products follow.
        several = (products[:, g * apart :] for g in range(len(groups) + 1))
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            made = [without(compared.score(each, lengths), compared.sets, minus, weight) for each in several]
        return np.concatenate([*made, lengths[:, None]], axis=1)

    columns = count * (len(groups) + 1) + 1
    rows, streamed, dots = in_order(train, compared.directions, score, columns, wanted, apart)
    _warn_shared(rows, valid)
    table = np.ascontiguousarray(streamed[:, :count])
    if not np.isfinite(table).all(axis=1).any():
        raise none_usable(train)
    meta: dict[str, Any] = {
        "metric": given.metric, "mean": given.mean, "max_valid": given.max_valid, "seed": given.valid_seed,
        "train": _origin(train), "valid": [_origin(store) for store in valid],
    }  # fmt: skip
    if given.aggregate != "mean":
        meta["aggregate"] = given.aggregate
    if minus is not None:
        meta |= {"minus": minus, "minus_weight": weight}
    if train.groups:
        meta["groups"] = groups
    parts = (
        streamed[:, count:-1].reshape(len(rows), len(groups), count).transpose(0, 2, 1) if groups else None
    )
    scores = Scores(rows, kept_sets, table, meta, store=train, groups=groups, contributions=parts)
    if not pairs:
        return scores
    from cropi.ranking.pairwise import made

    held = made(rows, compared.valid, compared.sketches, dots, streamed[:, -1].copy())
    return replace(scores, pairs=held)


# How much the lengths of one gradient may differ, made twice: in bfloat16 half a hundredth was measured.
SAME_LENGTH = 0.01
# Of a store's notes: ids are numbers of rows, and say nothing about which prompts they are.
NUMBERED = "numbered"


class SharedPrompts(UserWarning):
    """Prompts are on both sides of a comparison."""


def _warn_shared(rows: Sequence[RowInfo], valid: Sequence[SketchStore]) -> None:
    """Say where training prompts are validation prompts too: of one id, with responses and gradients of one length."""
    named = [store for store in valid if not store.manifest.get("notes", {}).get(NUMBERED)]
    others = {row.id: row for store in named for row in store.rows() if row.status == OK and row.norm}
    shared = [row.id for row in rows if row.norm and (other := others.get(row.id)) and _alike(row, other)]
    if shared:
        warn(
            f"{len(shared)} training prompts are validation prompts too, for example {shared[0]!r}: a score holds such "
            "a prompt's own gradient, which raises it; leave them out on one side, unless this is meant",
            SharedPrompts,
        )


def _alike(row: RowInfo, other: RowInfo) -> bool:
    """Whether two rows are of the same responses. Their gradients were rounded in batches of their own."""
    same = (row.tokens, row.pass_rate) == (other.tokens, other.pass_rate)
    return same and abs(row.norm - other.norm) <= SAME_LENGTH * other.norm


@dataclass(frozen=True)
class _Compared:
    """The validation side of a comparison.

    Attributes:
        sets: the names of the validation sets.
        directions: what training sketches are multiplied with: the sets' means, if they are needed, then the sketches
            of the prompts ``valid``.
        score: scores from these products and the lengths of the training sketches.
        valid: the validation prompts whose products are wanted one by one.
        sketches: their sketches.
    """

    sets: list[str]
    directions: torch.Tensor
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    valid: list[RowInfo]
    sketches: torch.Tensor


def _compared(valid: Sequence[SketchStore], given: Influence, pairs: bool) -> _Compared:
    from cropi.ranking.pairwise import nearest_scores, validation

    metric, nearest = given.metric, given.aggregate == "nearest"
    rows, sketches = (
        validation(valid, given.max_valid, given.valid_seed)
        if pairs or nearest
        else ([], torch.empty(0, valid[0].dim, dtype=torch.float32, device="cpu"))
    )
    if nearest:
        sets, score = nearest_scores(rows, sketches, metric)
        return _Compared(sets, sketches, score, rows, sketches)
    means = validation_means(valid, given)
    directions = torch.stack(list(means.values())).float()
    norms = np.linalg.norm(directions.double().numpy(), axis=1)
    count = len(means)

    def of_means(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        with_means = products[:, :count]
        return with_means / norms / lengths[:, None] if metric == "cosine" else with_means

    return _Compared(list(means), torch.cat([directions, sketches]), of_means, rows, sketches)


def score_rows(
    sketches: torch.Tensor, means: Mapping[str, torch.Tensor], *, metric: str = "cosine"
) -> np.ndarray:
    """The scores of sketches that are in memory: float64 ``[n, sets]``.

    Args:
        sketches: float ``[n, dim]``, one row per prompt.
        means: for each validation set the mean of its sketches, float ``[dim]``.
        metric: "cosine" or "dot".

    Raises:
        CropiError: kinds or shapes that do not fit together, no validation set, or an unknown metric.
    """
    if metric not in METRICS:
        raise CropiError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(sketches, torch.Tensor):
        raise CropiError(f"sketches is {article(type(sketches).__name__)}: give a tensor [prompts, dim]")
    if not isinstance(means, Mapping) or not means:
        kind = "empty" if isinstance(means, Mapping) else article(type(means).__name__)
        raise CropiError(
            f"means is {kind}: give a dict with the mean of every validation set, {{'name': [dim]}}"
        )
    if sketches.ndim != 2:
        raise CropiError(f"sketches has shape {list(sketches.shape)}: give [prompts, dim]")
    for name, mean in means.items():
        if mean.shape != sketches.shape[1:]:
            raise CropiError(
                f"means[{name!r}] has shape {list(mean.shape)}: give [{sketches.shape[1]}], the sketches' dim"
            )
    rows = sketches.detach().cpu().double().numpy()
    directions = [mean.detach().cpu().double().numpy() for mean in means.values()]
    # Row by row: a matrix product rounds a row by its place in the shard, and equal sketches would not be equal.
    scores = np.stack([np.einsum("nd,d->n", rows, direction) for direction in directions], axis=1)
    if metric == "cosine":
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            scores = scores / [np.linalg.norm(direction) for direction in directions] / lengths[:, None]
    return scores


def validation_means(
    stores: Sequence[SketchStore], comparing: Influence | None = None
) -> dict[str, torch.Tensor]:
    """The mean sketch of every validation set, float64 ``[dim]``, by set name in sorted order; of the options count
    ``mean``, ``aggregate``, ``max_valid`` and ``valid_seed``.

    Raises:
        CropiError: a store is unfinished, a set has no prompt with a usable sketch, or its mean is zero, unless the
            nearest prompts count alone.
    """
    given = comparing or Influence()
    means = any_means(stores, given)
    for name in means:
        if words := without_direction(name, means, given):
            raise CropiError(f"{words}; leave the set out, or give other prompts")
    return means


def without_direction(name: str, means: Mapping[str, torch.Tensor], given: Influence) -> str:
    """That no prompt can be scored against the mean of a set, in words; nothing where one can be."""
    if given.aggregate == "nearest" or float(means[name].norm()) > 0:
        return ""
    return f"validation set {name!r}: the mean of its gradients is zero, so it has no direction"


def any_means(stores: Sequence[SketchStore], given: Influence) -> dict[str, torch.Tensor]:
    """:func:`validation_means`, zero ones too."""
    for store in stores:
        store.check_finished()
    chosen = choose_members(stores, given.max_valid, given.valid_seed)
    sums = {name: torch.zeros(stores[0].dim, dtype=torch.float64, device="cpu") for name in chosen}
    for number, store in enumerate(stores):
        for kept, sketches in store.shards():
            for row, vector in zip(kept, sketches.double(), strict=True):
                name = row.set or DEFAULT_SET
                if (number, row.id) in chosen.get(name, ()):
                    sums[name] += vector / vector.norm() if given.mean == "normalised" else vector
    return {name: total / len(chosen[name]) for name, total in sums.items()}


def choose_members(
    stores: Sequence[SketchStore], cap: int | None, seed: int
) -> dict[str, set[tuple[int, str]]]:
    """The prompts of every set that count, as (store number, id)."""
    members: dict[str, list[tuple[int, str]]] = {}
    reasons: dict[str, list[str]] = {}
    held: dict[tuple[str, str], int] = {}
    for number, store in enumerate(stores):
        for row in store.rows():
            name = row.set or DEFAULT_SET
            if (before := held.setdefault((name, row.id), number)) != number:
                raise CropiError(
                    f"{store.path} holds the prompt {row.id!r} of the validation set {name!r}, and so does "
                    f"{stores[before].path}: it would count twice; give every prompt once, or sets of their own (--set)"
                )
            members.setdefault(name, [])
            if row.status == OK:
                members[name].append((number, row.id))
            else:
                reasons.setdefault(name, []).append(row.reason)
    if not members:
        raise CropiError(
            f"{', '.join(str(s.path) for s in stores)}: no validation prompt at all; give stores that "
            "hold some"
        )
    for name, candidates in members.items():
        if not candidates:
            raise CropiError(
                f"validation set {name!r} has no usable prompt: {left_out(reasons[name])}, or leave the set out"
            )
    chosen = {}
    for name in sorted(members):
        # By id alone: another order of the stores would be another draw.
        candidates = sorted(members[name], key=lambda member: member[1])
        if cap is not None and len(candidates) > cap:
            picked = np.random.default_rng(seed).choice(len(candidates), cap, replace=False)
            candidates = [candidates[i] for i in picked]
        chosen[name] = set(candidates)
    return chosen


def none_usable(train: SketchStore) -> CropiError:
    """The error for a store of training prompts of which none has a usable sketch."""
    reasons = [row.reason for row in train.rows() if row.status != OK]
    return CropiError(f"{train.path}: no training prompt has a usable sketch: {left_out(reasons)}")


def left_out(reasons: Sequence[str]) -> str:
    """How many prompts were left out and why, and what to give in their place."""
    remedies = {
        EQUAL_REWARDS: "prompts that are solved sometimes",
        ONE_RESPONSE: "several responses to each prompt",
    }
    # Gradients that vanish or overflow do so whatever the rewards, and an array's rows have none.
    other = (
        " and ".join(words for why, words in remedies.items() if why in reasons)
        or "others, finite and not zero"
    )
    return f"{len(reasons)} were left out ({', '.join(sorted(set(reasons)))}); give {other}"


def _origin(store: SketchStore) -> dict[str, Any]:
    kept = (
        "spec",
        "spec_fingerprint",
        "stage",
        "model",
        "tokenizer",
        "trajectories",
        "estimator",
        "behaviour",
    )
    several = {"paths": [str(path) for path in store.paths]} if len(store.paths) > 1 else {}
    return {"path": str(store.path)} | several | {key: store.manifest.get(key) for key in kept}
